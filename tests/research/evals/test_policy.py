"""A policy at toy size: what its completions depend on, its log-probs, prompts that do not fit, its episodes."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from models.config import ModelConfig
from research.algorithms.base import completion_rows
from research.config.sections import Evaluation, Sampler
from research.core.errors import DataError
from research.data.chat import Message
from research.data.report import Limits
from research.data.tokenizer import Tokenizer, train_tokenizer
from research.environments.base import Completion, Turn
from research.environments.interaction import Interaction
from research.evals.policy import TrainedPolicy
from research.rewards.builtin import environment
from research.tasks.jsonl import Jsonl
from tests.models.tiny import make_params
from tests.research.algorithms.toy import one_device, quick_compilation

RECORDS = [{"prompt": text, "answer": "7"} for text in ("3+4", "1+6", "2+5+0", "9-2")]
HOW = Evaluation(problems=4, samples=2, k=(1,), max_prompt_length=24, max_new_tokens=6, batch_problems=2, seed=5)


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with quick_compilation(), jax.set_mesh(one_device()):
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("t") / "characters.model"
    corpus = "0123456789+-# abcdefghijklmnopqrstuvwxyz\n"
    return train_tokenizer([corpus], vocab_size=None, path=path, model_type="char", byte_fallback=False)


@pytest.fixture(scope="module")
def policy(tokenizer: Tokenizer) -> TrainedPolicy:
    model = ModelConfig(
        vocab_size=tokenizer.vocab_size, num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=24,
        logprob_chunk=64,
    )  # fmt: skip
    task = Jsonl(answer_format="mark")
    return TrainedPolicy(
        make_params(model), model, one_device(), tokenizer, Sampler(cache_bucket=64), HOW, task, RECORDS
    )


def fresh(policy: TrainedPolicy, **changes: Any) -> TrainedPolicy:
    return dataclasses.replace(policy, drawn={}, errors=[], **changes)


def tokens(groups: Any) -> list[list[list[int]]]:
    return [[sample.tokens.tolist() for sample in group] for group in groups]


def test_a_completion_depends_on_seed_and_places_not_on_the_batch(policy: TrainedPolicy) -> None:
    made = fresh(policy)
    groups = made.generate(made.held_out(), seed=5)
    assert [len(group) for group in groups] == [2] * 4
    assert made.generate(made.held_out(), seed=5) is groups, "equal calls are drawn once"
    other = fresh(policy, settings=dataclasses.replace(HOW, batch_problems=3))
    assert tokens(other.generate(other.held_out(3), seed=5, samples=1)) == [g[:1] for g in tokens(groups)[:3]]
    assert tokens(made.generate(made.held_out(), seed=6)) != tokens(groups)
    greedy = tokens(made.generate(made.held_out(), seed=5, temperature=0.0))
    assert all(first == second for first, second in greedy)
    assert max(len(s) for g in tokens(made.generate(made.held_out(1), seed=5, max_new_tokens=3)) for s in g) <= 3


def test_log_probs_are_those_that_the_sampler_reports(policy: TrainedPolicy) -> None:
    made = fresh(policy)
    (group,) = made.generate(made.held_out(1), seed=5)
    for sample in group:
        n = len(sample.tokens)
        assert sample.drawn.all() and sample.length == n
        rows = completion_rows(
            sample.prompt[None], np.ones((1, len(sample.prompt)), bool), sample.tokens[None], sample.drawn[None],
            np.ones(1),
        )  # fmt: skip
        np.testing.assert_allclose(made.logps(rows)[0, -n:], sample.logps, atol=1e-4)


def test_prompts_that_do_not_fit_are_left_out_and_counted_or_refused(
    policy: TrainedPolicy, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [RECORDS[0], {"prompt": "1+" * 30, "answer": "7"}, RECORDS[1]]
    made = fresh(policy, records=records, limits=Limits("drop", 0.5))
    assert [record["prompt"] for record in made.held_out()] == ["3+4", "1+6"]
    assert "evaluation: 3 records, 1 dropped" in capsys.readouterr().out
    groups = made.generate(made.held_out(), seed=5)
    prompts = [policy.tokenizer.decode(group[0].prompt.tolist()) for group in groups]
    assert ["3+4" in prompts[0], "1+6" in prompts[1]] == [True, True]
    with pytest.raises(DataError, match="record 1"):
        fresh(policy, records=records).held_out()


class Echo:
    """Answers two turns with the record's prompt and the turn's number, and rewards them."""

    def reset(self, record: Any, seed: int) -> list[Message]:
        del seed
        self.record, self.turns = record, 0
        return [Message("user", record["prompt"])]

    def step(self, completion: Completion) -> Turn:
        del completion
        self.turns += 1
        if self.turns == 3:
            return Turn(done=True)
        return Turn([Message("user", f"{self.record['prompt']} {self.turns}")], reward=0.5)


def test_every_completion_has_an_episode_of_its_own_record(policy: TrainedPolicy) -> None:
    """At a high temperature turns end by chance; the engine feeds what the row's own episode answers."""
    made = fresh(
        policy, interaction=Interaction(Echo, policy.tokenizer, max_turns=4, version={}), yardstick=environment,
        sampler=Sampler(slots=8, chunk=16, admit=3, cache_bucket=256),
        settings=dataclasses.replace(HOW, batch_problems=3, max_new_tokens=100, temperature=100.0, samples=10),
    )  # fmt: skip
    groups = made.generate(made.held_out(3), seed=5)
    answered = []
    for record, group in zip(RECORDS, groups, strict=False):
        for sample in group:
            assert sample.turns is not None
            given = policy.tokenizer.decode(sample.tokens[~sample.drawn].tolist(), show_markup=True)
            for turn in range(1, sample.turns.turns + 1):
                assert f"{record['prompt']} {turn}<|im_end|>" in given
            assert given.count("<|im_end|>") == sample.turns.turns <= 2
            assert sample.turns.reward >= 0.5 * sample.turns.turns
            assert made.correct(sample, record) == (sample.turns.reward if sample.stopped else 0.0)
            answered.append(sample.turns.turns)
    assert sum(answered) > 3 and len(set(answered)) > 1
