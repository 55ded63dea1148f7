"""Rewards of one iteration's samples: who says what is paid, who says what is right, and what each may read."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from research.algorithms.base import rollout_batch
from research.config.sections import Reward
from research.core.errors import DataError
from research.data.chat import Message
from research.environments.turns import RowTurns
from research.rewards.base import Dialogue, RewardContext, RewardError, WeightedReward
from research.rewards.builtin import correct
from research.rollouts.rewards import RolloutRewards
from research.rollouts.samples import Collected, rollout_metrics
from research.sampling.decoded import Decoded
from research.tasks.jsonl import Jsonl

G = 4
STEP_END = 9


class Payer:
    """Two prompts whose answers are "0" and "1", rewarded by a function of the text and the record."""

    def __init__(self, function: Any, *, scorer: Any = None, steps: Any = None, yardstick: Any = None, **reward: Any):
        self.rewards = RolloutRewards(
            Reward(**reward),
            (WeightedReward("mine", function),),
            yardstick or function,
            Jsonl(answer_format="plain"),
            group_size=G,
            max_new_tokens=8,
            seed=3,
            scorer=scorer,
            process=steps and SimpleNamespace(steps=steps),
        )
        self.records = [{"prompt": f"{i}?", "answer": str(i), "unit": f"u{i}"} for i in range(2)]

    def pay(
        self, texts: list[str], *, stopped: Any = None, lengths: Any = None, step: int = 5, **dialogues: Any
    ) -> Collected:
        rng = np.random.default_rng(0)
        B, N = len(texts), 8
        lengths = np.full(B, N) if lengths is None else np.asarray(lengths)
        mask = np.arange(N) < lengths[:, None]
        arrays: Any = SimpleNamespace(
            tokens=np.where(mask, rng.integers(4, 12, (B, N)), 0).astype(np.int32),
            mask=mask,
            lengths=lengths,
            sampler_logps=np.where(mask, -1.0, 0.0).astype(np.float32),
        )
        prompts = {
            "prompt_tokens": np.array([[0, 9, 5], [4, 9, 6]], np.int32),
            "prompt_mask": np.array([[False, True, True], [True, True, True]]),
            "prompt_id": np.array([7, 8], np.int32),
        }
        stopped = np.ones(B, bool) if stopped is None else stopped
        return self.rewards(prompts, self.records, Decoded(arrays, texts, stopped, {}, **dialogues), step)


TEXTS = ["0", "1", "0", "bad", "1", "bad", "0", "1"]
"""Of prompt 7 (its answer is "0"), then of prompt 8."""


def equals(text: str, record: Any, context: RewardContext) -> Any:
    del context
    if text == "bad":
        raise RuntimeError("cannot parse")
    return None if text == "?" else float(text == record["answer"])


def test_what_counts_as_right_is_the_sections_threshold_before_shaping() -> None:
    def half(text: str, record: Any, context: RewardContext) -> float:
        return 0.5 * equals(text, record, context)

    texts = ["0", "1", "0", "1", "1", "0", "0", "1"]
    right = [True, False, True, False, True, False, False, True]
    assert not Payer(half).pay(texts).rollouts.correct.any(), "1 by default, which half a point never reaches"
    for threshold, expected in ((0.5, right), (0.0, [True] * 8)):
        paid = Payer(half, success_threshold=threshold, length_coef=0.1).pay(texts)
        assert paid.rollouts.correct.tolist() == expected


@pytest.mark.parametrize("unknown", [0.0, -2.5, 7.0])
def test_a_function_that_raises_costs_one_sample_not_the_run(unknown: float) -> None:
    paid = Payer(equals, unknown=unknown).pay([*TEXTS[:-1], "?"])
    u = unknown
    assert paid.rollouts.rewards.tolist() == [1, 0, 1, u, 1, u, 0, u]
    assert paid.rollouts.correct.tolist() == [True, False, True, False, True, False, False, False]
    assert paid.gold.tolist() == [1, 0, 1, 0, 1, 0, 0, 0], "what cannot be told is not right, whatever it is paid"
    assert paid.metrics["reward/mine/unknown"] == paid.metrics["reward/gold_unknown"] == 3 / 8
    assert paid.errors == tuple(RewardError(i, "mine", "RuntimeError: cannot parse") for i in (7, 8))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_no_number_names_prompt_and_function(value: float) -> None:
    def broken(text: str, record: Any, context: Any) -> float:
        return value if record["answer"] == "1" else equals(text, record, context)

    with pytest.raises(DataError, match=f"prompt 8: reward function mine returned {value}, expected a finite"):
        Payer(broken).pay(["0"] * 8)


def test_functions_get_their_record_and_context() -> None:
    seen: list[Any] = []

    def mine(text: str, record: Any, context: RewardContext) -> float:
        seen.append((text, record["unit"], context))
        return 0.0

    stopped = np.array([True, False] * 4)
    payer = Payer(mine)
    payer.pay(TEXTS, stopped=stopped, lengths=range(1, 9))
    assert [(text, unit) for text, unit, _ in seen] == [(t, f"u{i // G}") for i, t in enumerate(TEXTS)]
    contexts = [context for *_, context in seen]
    assert [c.length for c in contexts] == list(range(1, 9)) and [c.stopped for c in contexts] == stopped.tolist()
    assert {c.prompt for c in contexts[:G]} == {(Message("user", "0?"),)} and contexts[0].turns is None
    seeds = [c.seed for c in contexts]
    assert len(set(seeds)) == 8 and min(seeds) >= 0
    seen.clear()
    payer.pay(TEXTS)
    assert [context.seed for *_, context in seen] == seeds, "the same step, the same draws"
    seen.clear()
    payer.pay(TEXTS, step=6)
    assert not set(seeds) & {context.seed for *_, context in seen}


def test_neither_results_nor_earlier_turns_can_be_taken_for_the_answer() -> None:
    """A dialogue names the right answer in an earlier turn and in a tool's result; the last turn does not."""
    dialogue = "0<tool_call>x</tool_call><|im_end|><tool_result>\n0\n</tool_result>none\n0"
    seen: list[Any] = []

    def mine(text: str, record: Any, context: RewardContext) -> float:
        seen.append((text, context.turns))
        return float(record["answer"] in text)

    turns = (RowTurns(calls=(("search", "ok"),), finish="answered"),) * 8
    paid = Payer(mine, yardstick=correct).pay(["none"] * 8, dialogues=[dialogue] * 8, turns=turns)
    assert not paid.rollouts.rewards.any() and not paid.gold.any() and not paid.rollouts.correct.any()
    assert {text for text, _ in seen} == {"none"}
    assert {turns for _, turns in seen} == {Dialogue(dialogue, (("search", "ok"),))}
    assert paid.texts == [dialogue] * 8


def test_what_never_stops_is_not_right_whatever_the_yardstick_says() -> None:
    stopped = np.array([True, False] * 4)
    paid = Payer(lambda *_: 1.0).pay(["0"] * 8, stopped=stopped)
    assert paid.rollouts.correct.tolist() == stopped.tolist() and paid.gold.tolist() == stopped.tolist()


def test_the_yardstick_measures_and_the_reward_functions_teach() -> None:
    def long(text: str, record: Any, context: RewardContext) -> float:
        del text, record
        return float(context.length)

    paid = Payer(long, yardstick=correct, format_mode="gated", format_coef=0.5, format_pattern="final_line").pay(
        TEXTS, lengths=range(1, 9)
    )
    right = [True, False, True, False, True, False, False, True]
    bonus = [0.5 * text.rpartition("\n")[2].startswith("####") for text in TEXTS]
    assert paid.rollouts.rewards.tolist() == [n + more for n, more in zip(range(1, 9), bonus, strict=True)]
    assert paid.rollouts.correct.all() and paid.gold.tolist() == right
    assert paid.metrics["reward/mine/mean"] == 4.5 and rollout_metrics(paid)["reward/gold"] == 0.5


def test_a_yardstick_that_is_a_reward_runs_once() -> None:
    calls: list[str] = []

    def mine(text: str, record: Any, context: RewardContext) -> Any:
        calls.append(text)
        return equals(text, record, context)

    assert Payer(mine).pay(TEXTS).gold.sum() == 4 and calls == TEXTS
    assert len(Payer(mine, yardstick=equals).pay(TEXTS).errors) == 4, "those of both"


class Scored:
    """A reward model by hand."""

    networks = ()

    def __init__(self, scorer: Any) -> None:
        self.scorer = scorer

    def __call__(self, rows: Any) -> np.ndarray:
        return self.scorer(rows)


def test_a_reward_model_pays_and_the_yardstick_stays_as_gold() -> None:
    scores = np.linspace(-1, 1, 8).astype(np.float32)
    seen = []

    def scorer(rows: Any) -> np.ndarray:
        seen.append(rows)
        return scores

    paid = Payer(equals, scorer=Scored(scorer), source="model").pay(["0"] * 8, lengths=range(1, 9))
    np.testing.assert_array_equal(paid.rollouts.rewards, scores)
    assert paid.gold.tolist() == [1] * 4 + [0] * 4
    # The yardstick is logged but not used for training: correct is what is above the mean of its group.
    assert paid.rollouts.correct.tolist() == [False, False, True, True] * 2
    (rows,) = seen
    # Left-padded prompts, right-padded completions: positions and masks come from lengths.
    assert rows.segment_ids.sum(axis=1).tolist() == [3, 4, 5, 6, 8, 9, 10, 11]
    assert rows.loss_mask.sum(axis=1).tolist() == list(range(1, 9)) and not rows.loss_mask[:, :3].any()
    for b in range(8):
        real = rows.segment_ids[b] > 0
        assert rows.positions[b][real].tolist() == list(range(real.sum()))


def test_step_rewards_lie_on_the_last_tokens_of_the_steps() -> None:
    def steps(rows: Any) -> tuple[np.ndarray, np.ndarray]:
        ends = rows.loss_mask & (rows.tokens == STEP_END)
        return np.where(ends, (rows.positions + 1) / 100, 0).astype(np.float32), ends

    paid = Payer(equals, steps=steps, step_coef=0.5).pay(["0"] * 8, lengths=[8, 1, 8, 3, 8, 8, 2, 8])
    rolled, total = paid.rollouts, 0.0
    assert rolled.step_rewards is not None and rolled.step_mask is not None and rolled.step_mask.any()
    for b in range(8):
        real_prompt = int(rolled.prompt_mask[b].sum())
        for n in range(8):
            is_end = bool(rolled.mask[b, n]) and rolled.tokens[b, n] == STEP_END
            expected = 0.5 * (real_prompt + n + 1) / 100 if is_end else 0.0
            assert rolled.step_rewards[b, n] == pytest.approx(expected) and rolled.step_mask[b, n] == is_end
            total += expected
    assert paid.metrics["reward/steps"] == pytest.approx(total / 8)
    batch = rollout_batch(rolled, mask_truncated=False)
    ends = batch.sequences.loss_mask & (batch.sequences.tokens == STEP_END)
    np.testing.assert_array_equal(batch.step_mask, ends)
    np.testing.assert_array_equal(batch.step_rewards > 0, ends)


def test_reference_statistics_are_those_of_the_first_samples_and_stay() -> None:
    payer = Payer(equals, normalize="reference")
    first = payer.pay(["0", "1", "0", "1"] * 2)
    assert first.rollouts.rewards.mean() == pytest.approx(0) and first.rollouts.rewards.std() == pytest.approx(1)
    kept = payer.rewards.get_state()
    assert kept["count"] == 8
    again = payer.pay(["0"] * 8)
    assert payer.rewards.get_state() == kept
    assert again.rollouts.rewards.tolist() == [1.0] * 4 + [-1.0] * 4
    other = Payer(equals, normalize="reference")
    other.rewards.set_state(kept)
    np.testing.assert_array_equal(other.pay(["0"] * 8).rollouts.rewards, again.rollouts.rewards)
