"""Speculative decoding beside plain decoding: what is counted, and how a speed-up is read off."""

import string

import numpy as np
import pytest

from research.comparisons.speculative import PLAIN, compare, problem_prompts, records, table
from research.comparisons.timing import Series
from research.core.errors import DataError
from research.data.chat import normalize_record, render_prompt
from research.data.tokenizer import Tokenizer, train_tokenizer
from research.sampling.drafts import Draft
from research.sampling.types import Prompts
from tests.models.tiny import ONE_LAYER, make_params, make_tokens
from tests.research.sampling.tiny import GREEDY, make_spec, scalars


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    corpus = string.ascii_letters + string.digits + string.punctuation + " \n"
    path = tmp_path_factory.mktemp("tokenizer") / "characters.model"
    return train_tokenizer([corpus], vocab_size=None, path=path, model_type="char", byte_fallback=False)


def test_a_prompt_is_a_whole_problem_with_a_long_answer(tokenizer: Tokenizer) -> None:
    """Padded on the left, as a rollout poses it; the token that ends a turn counts as the answer's."""
    answers = {"1+2": "3", "4+5": "12345", "4+5+6+7+8": "123456", "7-1": "1234"}
    records = [{"prompt": prompt, "completion": answer} for prompt, answer in answers.items()]
    posed = [render_prompt(normalize_record(r, where="")[:1], tokenizer) for r in records]
    longest = posed[0].size + 2
    prompts = problem_prompts(records, tokenizer, count=2, length=longest, new_tokens=5)
    for prompt, expected in zip(prompts, (posed[1], posed[3]), strict=True):
        np.testing.assert_array_equal(prompt.tokens[prompt.mask], expected)
        assert prompt.mask.tolist() == [[False] * 2 + [True] * expected.size]
    with pytest.raises(DataError, match=f"2 have a prompt of at most {longest} .* least 5, expected 3"):
        problem_prompts(records, tokenizer, count=3, length=longest, new_tokens=5)


@pytest.mark.slow
def test_every_prompt_is_timed_with_every_contender() -> None:
    params = make_params(ONE_LAYER)
    contenders = {"itself": Draft(params, ONE_LAYER, 3), "ngram": Draft(None, None, 2)}
    found = compare(
        params,
        [
            Prompts(tokens[None], np.ones((1, 6), bool), np.array([number]))
            for number, tokens in enumerate(make_tokens(ONE_LAYER, 3, 6))
        ],
        contenders,
        scalars(),
        config=ONE_LAYER,
        spec=make_spec(8, method=GREEDY),
    )
    assert list(found) == [PLAIN, "itself", "ngram"]
    for timing in found.values():
        assert timing.tokens == (8, 8, 8)
        assert len(timing.seconds) == 3 and min(timing.seconds) > 0
    assert found[PLAIN].about == {}
    # All three prompts together: two forward passes each, every proposal right.
    assert found["itself"].about == {
        "sampler/target_forwards": 6.0,
        "sampler/acceptance_rate": 1.0,
        "sampler/tokens_per_forward": 4.0,
    }


def test_the_table_says_what_was_accepted_and_the_speed_up() -> None:
    metrics = {"sampler/acceptance_rate": 0.5, "sampler/tokens_per_forward": 2.25}
    timings = {PLAIN: Series((1.0,), (8,)), "ngram, 2": Series((0.5,), (8,), metrics)}
    found = records(timings, 0.0)
    assert [each["speed_up"] for each in found] == [(1.0, 1.0), (2.0, 2.0)]
    assert table(found).splitlines()[2:] == ["| 0 | plain |  |  | 8 |  |", "| 0 | ngram, 2 | 50% | 2.25 | 16 | 2.00x |"]
