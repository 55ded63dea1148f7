"""Scorers at work: what each kind reads, in chunks or at once, and how its scores vote."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from research.core.network import Network
from research.data.steps import step_end_mask
from research.data.tokenizer import Tokenizer
from research.evals.scorers import Scorer, score_samples
from tests.research.algorithms import hand
from tests.research.algorithms.toy import MODEL, host_params, one_device, quick_compilation, rollouts

LENGTHS = np.array([8, 1, 3, 5, 2, 8])


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with quick_compilation(), jax.set_mesh(one_device()):
        yield


@pytest.fixture(scope="module")
def rows() -> Any:
    """Prompts padded on the left, completions on the right."""
    return rollouts(np.zeros(6), LENGTHS, group_size=2).rows(np.arange(6), np.ones(6))


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """Every third id breaks a line, id 0 shows nothing, all others show."""
    texts = {token: "\n" if token % 3 == 1 else " " if token == 0 else "x" for token in range(MODEL.vocab_size)}
    monkeypatch.setattr(Tokenizer, "vocab_size", MODEL.vocab_size)
    monkeypatch.setattr(Tokenizer, "decode", lambda _self, ids: "".join(texts[i] for i in ids))
    return Tokenizer(b"toy")


def scorer(kind: Any, tokenizer: Tokenizer, reductions: Any = ("min", "prod", "last", "mean")) -> Scorer:
    params = host_params(layout="scorer" if kind == "reward" else "step_scorer")
    return Scorer("prm", kind, Network(params, MODEL), tokenizer, one_device(), reductions)


def test_a_reward_model_is_read_at_the_last_token(rows: Any, tokenizer: Tokenizer) -> None:
    found = scorer("reward", tokenizer)
    assert found.scores == ("prm",)
    outputs = hand.outputs(found.network.params, rows)
    expected = [[outputs[b, 3 + n - 1, 0] for b, n in enumerate(LENGTHS)]]
    np.testing.assert_allclose(found(rows), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("problems", "n"), [(2, 3), (3, 20), (1, 33)])
def test_samples_are_scored_in_parts_as_each_would_be_alone(problems: int, n: int) -> None:
    """By a scorer that tells what it reads: the prompt's, the drawn and the given tokens."""
    rng = np.random.default_rng(problems)
    prompts = [rng.integers(1, 9, length) for length in rng.integers(1, 5, problems)]
    groups = [[(rng.integers(1, 9, k), rng.random(k) < 0.7) for k in rng.integers(0, 7, n)] for _ in range(problems)]

    def tell(rows: Any) -> np.ndarray:
        seen = rows.tokens * (rows.segment_ids > 0)
        return np.stack([seen[:, :5].sum(1), (seen * rows.loss_mask).sum(1), seen.sum(1), rows.positions.max(1)])

    found = score_samples(tell, prompts, groups, max_prompt_length=5, max_new_tokens=7, pad_id=9, mesh=one_device())
    assert found.shape == (4, problems, n)
    for p, prompt in enumerate(prompts):
        for i, (tokens, drawn) in enumerate(groups[p]):
            whole = [prompt.sum(), tokens[drawn].sum(), prompt.sum() + tokens.sum(), len(prompt) + len(tokens) - 1]
            assert found[:, p, i].tolist() == whole


def test_steps_are_read_at_their_ends_and_reduced(rows: Any, tokenizer: Tokenizer) -> None:
    found = scorer("process", tokenizer)
    assert found.scores == ("prm-min", "prm-prod", "prm-last", "prm-mean")
    outputs = hand.outputs(found.network.params, rows)
    probs = 1 / (1 + np.exp(outputs[:, :, 0] - outputs[:, :, 1]))
    ends = step_end_mask(rows.tokens, tokenizer, rows.loss_mask)
    assert len(set(ends.sum(axis=1))) > 2
    expected = np.full((4, len(LENGTHS)), -np.inf)
    for row in range(len(LENGTHS)):
        steps = probs[row, ends[row]]
        if len(steps):
            expected[:, row] = steps.min(), steps.prod(), steps[-1], steps.mean()
    np.testing.assert_allclose(found(rows), expected, rtol=1e-4)
    outcome = scorer("outcome", tokenizer)
    assert outcome.scores == ("prm",)
    np.testing.assert_allclose(outcome(rows), expected[2:3], rtol=1e-4)


def test_a_solution_without_a_step_comes_last_and_does_not_vote(rows: Any, tokenizer: Tokenizer) -> None:
    found = scorer("process", tokenizer, ("last",))
    empty = rows.replace(tokens=np.where(rows.loss_mask, 0, rows.tokens))
    scores = found(empty)
    np.testing.assert_array_equal(scores, np.full((1, 6), -np.inf))
    np.testing.assert_array_equal(found.weights(scores), np.zeros((1, 6)))


def test_rewards_vote_by_their_exponentials_and_probabilities_as_they_are(tokenizer: Tokenizer) -> None:
    scores = np.array([[0.25, 1.0, -np.inf]])
    np.testing.assert_array_equal(scorer("process", tokenizer).weights(scores), [[0.25, 1.0, 0.0]])
    scores = np.array([[1.0, 3.0, -np.inf, 2.0], [-np.inf] * 4])
    weights = scorer("reward", tokenizer).weights(scores)
    np.testing.assert_allclose(weights, [[np.exp(-2), 1.0, 0.0, np.exp(-1)], [0.0] * 4])
    np.testing.assert_allclose(scorer("reward", tokenizer).weights(scores + 1000.0), weights)
