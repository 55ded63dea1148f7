"""Samples of one iteration: what is paid and how, and what dynamic sampling replaces."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from research.algorithms.base import rollout_batch
from research.config.sections import Reward
from research.core.errors import DataError
from research.evals.problems import Decoded
from research.rewards.normalization import RunningNorm
from research.rollouts.rollout import Drawn, Roller, join_groups, split_groups
from tests.objectives.cases import SEEDS
from tests.research.algorithms.toy import rollouts

G = 4
STEP_END = 9


def drawn(rewards: np.ndarray, first_prompt: int = 0) -> Drawn:
    """A batch of groups with these rewards; every array names its row."""
    B = rewards.size
    made = rollouts(rewards.reshape(-1), 1 + np.arange(B) % 8, group_size=rewards.shape[1])
    made = made._replace(
        prompt_ids=first_prompt + made.prompt_ids,
        step_rewards=np.full((B, 8), first_prompt, np.float32) + np.arange(B, dtype=np.float32)[:, None],
        advantage_scale=np.arange(B, dtype=np.float32) + 100 * first_prompt,
        given=np.arange(8) == (first_prompt + np.arange(B)[:, None]) % 8,
    )
    texts = [f"{first_prompt}:{row}" for row in range(B)]
    return Drawn(made, -made.rewards, texts, {"reward/score": float(rewards.mean())})


class Scripted(Roller):
    """Draws what it is told to."""

    def __init__(self, draws: list[Drawn], *, prompts: int, rounds: int) -> None:
        how = SimpleNamespace(prompts_per_step=prompts, resample_rounds=rounds)
        self.run: Any = SimpleNamespace(stage=SimpleNamespace(rollout=how))
        self.draws, self.sampler_steps = draws, list[int]()

    def _draw(self, session: Any, sampler_step: int) -> Drawn:
        del session
        self.sampler_steps.append(sampler_step)
        return self.draws[len(self.sampler_steps) - 1]


@pytest.mark.parametrize("seed", SEEDS)
def test_dynamic_sampling_replaces_groups_of_equal_rewards_up_to_the_budget(seed: int) -> None:
    """A loop over groups in the order drawn: the first P that teach something, then the first that do not."""
    rng = np.random.default_rng(seed)
    P, rounds = int(rng.integers(1, 5)), int(rng.integers(0, 4))
    chance = rng.choice([0.0, 0.3, 0.7, 1.0])
    tables = [
        np.where(rng.random((P, 1)) < chance, np.arange(G) % 2, rng.integers(0, 2, (P, 1))).astype(np.float32)
        for _ in range(rounds + 1)
    ]
    roller = Scripted([drawn(t, 10 * i) for i, t in enumerate(tables)], prompts=P, rounds=rounds)
    found = roller.roll(None, 7)  # type: ignore[arg-type]

    useful, useless, used = [], [], 0
    for used, table in enumerate(tables, 1):
        for p in range(P):
            name = (10 * (used - 1) + p, table[p])
            (useful if len(set(table[p])) > 1 else useless).append(name)
        if len(useful) >= P:
            break
    if rounds == 0:
        expected, used = [(p, tables[0][p]) for p in range(P)], 1
    else:
        expected = (useful + useless)[:P]
        cost = {key.split("/")[1]: value for key, value in found.metrics.items() if "dynamic" in key}
        assert cost == {
            "rounds": used,
            "groups_drawn": used * P,
            "groups_useful": len(useful),
            "groups_unfilled": max(0, P - len(useful)),
        }
    assert roller.sampler_steps == [7 * (rounds + 1) + i for i in range(used)]  # never the same draws twice
    assert found.rollouts.prompt_ids[::G].tolist() == [name for name, _ in expected]
    np.testing.assert_array_equal(found.rollouts.rewards, np.concatenate([r for _, r in expected]))


def test_all_arrays_of_a_row_move_with_its_group() -> None:
    equal, mixed = np.ones(G), np.arange(G) % 2
    draws = [drawn(np.stack([equal, mixed, equal])), drawn(np.stack([mixed, equal, mixed]), 10)]
    found = Scripted(draws, prompts=3, rounds=1).roll(None, 1)  # type: ignore[arg-type]
    sources = [(draws[0], 1), (draws[1], 0), (draws[1], 2)]
    rows = [(source, group * G + i) for source, group in sources for i in range(G)]
    for name, values in found.rollouts._asdict().items():
        if name in ("group_size", "step_mask"):
            continue
        expected = np.stack([getattr(source.rollouts, name)[row] for source, row in rows])
        np.testing.assert_array_equal(values, expected, err_msg=name)
    assert found.texts == [source.texts[row] for source, row in rows]
    assert found.gold.tolist() == [source.gold[row] for source, row in rows]
    assert found.rollouts.group_size == G and found.rollouts.step_mask is None


def test_groups_split_and_joined_are_the_batch() -> None:
    batch = drawn(np.arange(12.0).reshape(3, G))
    groups = split_groups(batch)
    assert [group.rollouts.prompt_ids.tolist() for group in groups] == [[p] * G for p in range(3)]
    joined = join_groups(groups, batch.metrics)
    for name, values in batch.rollouts._asdict().items():
        np.testing.assert_array_equal(getattr(joined.rollouts, name), values, err_msg=name)
    assert joined.texts == batch.texts and joined.metrics == batch.metrics


class Till:
    """A roller that only pays: two prompts, answers "0" and "1", verified by a function of the text."""

    def __init__(self, verifier: Any, *, scorer: Any = None, steps: Any = None, **reward: Any) -> None:
        self.roller = Roller.__new__(Roller)
        how = SimpleNamespace(group_size=G, max_new_tokens=8)
        self.roller.run = SimpleNamespace(stage=SimpleNamespace(rollout=how))  # type: ignore[assignment]
        self.roller.reward = Reward(**reward)
        self.roller.problems = [{"prompt": f"{i}?", "answer": str(i)} for i in range(2)]  # type: ignore[assignment]
        self.roller.norm, self.roller.verifier = RunningNorm(), verifier
        self.roller.scorer = scorer
        self.roller.steps = steps and SimpleNamespace(steps=steps)
        self.said: list[str] = []
        self.session: Any = SimpleNamespace(note={}, progress=SimpleNamespace(say=self.said.append))

    def pay(self, texts: list[str], *, stopped: np.ndarray | None = None, lengths: Any = None) -> Drawn:
        rng = np.random.default_rng(0)
        B, N = len(texts), 8
        lengths = np.full(B, N) if lengths is None else np.asarray(lengths)
        mask = np.arange(N) < lengths[:, None]
        arrays = SimpleNamespace(
            tokens=np.where(mask, rng.integers(4, 12, (B, N)), 0).astype(np.int32),
            mask=mask,
            lengths=lengths,
            sampler_logps=np.where(mask, -1.0, 0.0).astype(np.float32),
        )
        prompts = {
            "prompt_tokens": np.array([[0, 9, 5], [4, 9, 6]], np.int32),
            "prompt_mask": np.array([[False, True, True], [True, True, True]]),
            "prompt_id": np.arange(2, dtype=np.int32),
        }
        stopped = np.ones(B, bool) if stopped is None else stopped
        return self.roller._pay(self.session, prompts, Decoded(arrays, texts, stopped, {}))  # type: ignore[arg-type]


TEXTS = ["0", "1", "0", "bad", "1", "bad", "0", "1"]
"""Of prompt 0 (its answer is "0"), then of prompt 1."""


def equals(text: str, answer: str) -> float:
    if text == "bad":
        raise RuntimeError("cannot parse")
    return float(text == answer)


@pytest.mark.parametrize("error_reward", [0.0, -2.5])
def test_a_verifier_that_raises_costs_one_sample_not_the_run(error_reward: float) -> None:
    till = Till(equals, unknown=error_reward)
    paid = till.pay(TEXTS)
    e = error_reward
    assert paid.rollouts.rewards.tolist() == [1, 0, 1, e, 1, e, 0, 1]
    assert paid.rollouts.correct.tolist() == [True, False, True, False, True, False, False, True]
    assert paid.metrics["reward/verifier_errors"] == 2
    errors = till.session.note["verifier_errors"]
    assert [found["prompt_id"] for found in errors] == [0, 1]
    assert all(found["source"] == "equals" and "cannot parse" in found["error"] for found in errors)
    assert len(till.said) == 1 and "2 samples raised" in till.said[0]


def test_a_long_run_of_errors_does_not_fill_the_record() -> None:
    till = Till(equals)
    for _ in range(10):
        till.pay(["bad"] * 8)
    assert len(till.session.note["verifier_errors"]) == 20


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_no_number_names_prompt_and_function(value: float) -> None:
    def broken(text: str, answer: str) -> float:
        return value if answer == "1" else equals(text, answer)

    with pytest.raises(
        DataError, match=f"prompt 1: reward function broken returned {value}, expected a finite"
    ):
        Till(broken).pay(["0"] * 8)


def test_what_never_stops_is_not_right_whatever_the_verifier_says() -> None:
    stopped = np.array([True, False] * 4)
    paid = Till(lambda text, answer: 1.0).pay(["0"] * 8, stopped=stopped)  # noqa: ARG005
    assert paid.rollouts.correct.tolist() == stopped.tolist() and paid.gold.tolist() == stopped.tolist()


def test_a_reward_model_pays_and_the_verifier_stays_as_gold() -> None:
    scores = np.linspace(-1, 1, 8).astype(np.float32)
    seen = []

    def scorer(rows: Any) -> np.ndarray:
        seen.append(rows)
        return scores

    paid = Till(equals, scorer=scorer).pay(["0"] * 8, lengths=[1, 2, 3, 4, 5, 6, 7, 8])
    np.testing.assert_array_equal(paid.rollouts.rewards, scores)
    assert paid.gold.tolist() == [1] * 4 + [0] * 4
    # Nothing verifies what a reward model pays: right is what beats the mean of its group.
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

    paid = Till(equals, steps=steps, step_coef=0.5).pay(["0"] * 8, lengths=[8, 1, 8, 3, 8, 8, 2, 8])
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
    till = Till(equals, normalize="reference")
    first = till.pay(["0", "1", "0", "1"] * 2)
    assert first.rollouts.rewards.mean() == pytest.approx(
        0
    ) and first.rollouts.rewards.std() == pytest.approx(1)
    kept = till.roller.get_state()
    again = till.pay(["0"] * 8)
    assert till.roller.get_state() == kept
    assert again.rollouts.rewards.tolist() == [1.0] * 4 + [-1.0] * 4
    other = Till(equals, normalize="reference")
    other.roller.set_state(kept)
    np.testing.assert_array_equal(other.pay(["0"] * 8).rollouts.rewards, again.rollouts.rewards)
