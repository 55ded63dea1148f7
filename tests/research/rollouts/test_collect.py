"""An iteration's samples: what is drawn by which numbers, what the curriculum is told, and what is spent."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from research.config.sections import Reward, Rollout
from research.rewards.base import RewardContext, RewardFunction, WeightedReward
from research.rewards.builtin import correct
from research.rollouts.collect import RolloutCollector
from research.rollouts.curriculum import Curriculum, CurriculumSampler
from research.rollouts.rewards import RolloutRewards
from research.sampling.decoded import Decoded
from research.tasks.jsonl import Jsonl

G, P, N = 4, 2, 6
RECORDS = [{"prompt": f"{i}?", "answer": str(i)} for i in range(4)]


class Prompts:
    """Prompts 0 1, 2 3, 0 1 ..."""

    def __init__(self) -> None:
        self.position = 0

    def __next__(self) -> dict[str, np.ndarray]:
        ids = (P * self.position + np.arange(P)) % len(RECORDS)
        self.position += 1
        tokens = np.tile(np.array([0, 9, 5], np.int32), (P, 1))
        return {"prompt_tokens": tokens, "prompt_mask": tokens > 0, "prompt_id": ids.astype(np.int32)}

    def get_state(self) -> dict[str, Any]:
        return {"position": self.position}

    def set_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Spent:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.rollouts: list[Any] = []
        self.passes: list[Any] = []

    def sampled(self, **counts: Any) -> None:
        self.rollouts.append(counts)

    def forward(self, **counts: Any) -> None:
        self.passes.append(counts)


class Case:
    """A collector whose policy answers "0", "1", "0", "1" to every prompt, in 1, 2, 3, 4 tokens."""

    def __init__(self, function: RewardFunction = correct, *, lengths: Any = (1, 2, 3, 4), **how: Any) -> None:
        self.numbers: list[int] = []
        self.spent, self.lengths = Spent(), np.tile(lengths, P)
        rewards = RolloutRewards(
            Reward(**{"normalize": how.pop("normalize", "none"), **how.pop("shaping", {})}),
            (WeightedReward("mine", function),), correct,
            Jsonl(answer_format="plain"), group_size=G, max_new_tokens=N, seed=0,
        )  # fmt: skip
        section = Rollout(prompts_per_step=P, group_size=G, **how)
        self.collector = RolloutCollector(self.sample, rewards, RECORDS, section)

    def sample(self, params: Any, prompts: Mapping[str, np.ndarray], number: int) -> Decoded:
        assert params == "policy" and len(prompts["prompt_id"]) == P
        self.numbers.append(number)
        mask = np.arange(N) < self.lengths[:, None]
        arrays: Any = SimpleNamespace(
            tokens=np.where(mask, 7, 0).astype(np.int32),
            mask=mask,
            lengths=self.lengths,
            sampler_logps=np.where(mask, -1.0, 0.0).astype(np.float32),
        )
        return Decoded(arrays, ["0", "1"] * (B // 2), np.ones(B, bool), {})

    def collect(self, prompts: Any, step: int) -> Any:
        return self.collector.collect("policy", prompts, self.spent, step)  # type: ignore[arg-type]


B = P * G


@pytest.mark.parametrize("shaping", [{}, {"length_coef": 1.0}, {"normalize": "running"}])
def test_the_curriculum_hears_what_is_right_and_not_what_is_paid(shaping: dict[str, Any]) -> None:
    curriculum = Curriculum(len(RECORDS), band=(0.25, 0.75), retry=0.0)
    prompts = CurriculumSampler(Prompts(), curriculum, batch_size=P, max_skipped=8, seed=0)
    case = Case(shaping=shaping)
    first = case.collect(prompts, 1)
    assert curriculum.pass_rates()[:2].tolist() == [0.5, 0.5]
    case.collect(prompts, 2)
    # Nobody ever answers "2" or "3".
    assert curriculum.pass_rates().tolist() == [0.5, 0.5, 0.0, 0.0]
    third = case.collect(prompts, 3)
    assert third.rollouts.prompt_ids[::G].tolist() == [0, 1], "2 and 3 are out of the band"
    assert first.metrics["curriculum/tried_fraction"] == 0.5
    assert third.metrics["curriculum/in_band_fraction"] == 0.5


def test_a_cut_completion_is_no_pass() -> None:
    curriculum = Curriculum(len(RECORDS), band=(0.25, 0.75))
    prompts = CurriculumSampler(Prompts(), curriculum, batch_size=P, max_skipped=8, seed=0)
    case = Case()
    whole = case.sample
    cut = np.arange(B) % 4 == 0
    object.__setattr__(case.collector, "sample", lambda *a: whole(*a)._replace(stopped=~cut))
    case.collect(prompts, 1)
    # Rows 0 and 4 are cut: of prompt 0 one "0" is left, of prompt 1 both "1".
    assert curriculum.pass_rates()[:2].tolist() == [0.25, 0.5]


def test_every_batch_has_its_own_numbers_and_what_is_discarded_is_spent_too() -> None:
    """Of prompts 0 and 1 rewards differ, of 2 and 3 none does."""
    case, prompts = Case(resample_rounds=2), Prompts()
    prompts.position = 1
    found = case.collect(prompts, 3)
    assert case.numbers == [9, 10], "step * (rounds + 1) + round"
    assert found.rollouts.prompt_ids[::G].tolist() == [0, 1]
    assert found.metrics["dynamic_sampling/rounds"] == 2
    tokens = 2 * 10
    context = (2 + tokens / B) / 2
    counts = {"completions": B, "tokens": tokens, "prompt_tokens": 2 * P, "context": context}
    assert case.spent.rollouts == [counts, counts] and case.spent.passes == []


def test_models_that_read_every_sample_are_spent() -> None:
    class Scored:
        networks = (SimpleNamespace(config="small"), SimpleNamespace(config="large"))

        def __call__(self, rows: Any) -> np.ndarray:
            return np.zeros(len(rows.tokens), np.float32)

    case = Case()
    case.collector.rewards.scorer = Scored()  # type: ignore[assignment]
    case.collect(Prompts(), 1)
    real = {"real_tokens": 2 * 10 + 2 * B, "context": (2 + 2.5) / 2}
    assert case.spent.passes == [{"model": "small", **real}, {"model": "large", **real}]


def test_resumed_statistics_give_the_same_rewards_to_the_last_bit() -> None:
    def noisy(text: str, record: Any, context: RewardContext) -> float:
        del record
        return float(np.random.default_rng(context.seed).normal(3.0, 2.0)) + float(text)

    whole, prompts = Case(noisy, normalize="running"), Prompts()
    expected = [whole.collect(prompts, step).rollouts.rewards for step in (1, 2, 3, 4)]
    before, prompts = Case(noisy, normalize="running"), Prompts()
    for step in (1, 2):
        before.collect(prompts, step)
    after, again = Case(noisy, normalize="running"), Prompts()
    after.collector.rewards.set_state(before.collector.rewards.get_state())
    again.set_state(prompts.get_state())
    found = [after.collect(again, step).rollouts.rewards for step in (3, 4)]
    np.testing.assert_array_equal(found, expected[2:])
    assert after.collector.rewards.norm == whole.collector.rewards.norm
    assert whole.collector.rewards.norm.count == 4 * B
