"""Shaping: each piece against a loop written from its paper, their order, and that all of it is off by default."""

import dataclasses
import json

import numpy as np
import pytest

from objectives.advantages import group_advantages
from research.config.sections import Reward
from research.rewards.builtin import FORMATS
from research.rewards.shaping import RunningNorm, advantage_scale, length_reward, overlong_penalty, shape
from tests.objectives.cases import SEEDS

GROUPS = [(1, 1), (2, 4), (3, 2), (1, 8), (4, 3)]
LIMIT = 12
TEXTS = ("2+2=4\n#### 4", "#### 4", "I say 4", "#### 3\n#### 4", "#### 4\nor so", "")
EVERYTHING = Reward(
    format_mode="gated",
    format_coef=0.3,
    length_coef=0.5,
    overlong_buffer=5,
    overlong_coef=2.0,
    missing_eos_penalty=0.7,
    score_clip=1.5,
    normalize="running",
    difficulty_weighting="fail_rate",
)


def rollouts(seed):
    """Scores, all-equal ones among them; lengths from 1 to the limit; cut where they reach it."""
    rng = np.random.default_rng(seed)
    P, G = GROUPS[seed % len(GROUPS)]
    B = P * G
    rewards = (rng.normal(2.0, 3.0, B) if seed % 3 else np.full(B, 0.1)).astype(np.float32)
    lengths = rng.integers(1, LIMIT + 1, B) if seed % 4 else np.full(B, rng.integers(1, LIMIT + 1))
    return rewards, {
        "correct": rng.random(B) < 0.5,
        "texts": [TEXTS[i] for i in rng.integers(len(TEXTS), size=B)],
        "lengths": lengths,
        "stopped": lengths < LIMIT,
        "group_size": G,
        "max_new_tokens": LIMIT,
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_done_by_default(seed):
    rewards, case = rollouts(seed)
    state = RunningNorm(3, 1.0, 2.0)
    out = shape(rewards, **case, spec=Reward(), state=state)
    assert out.rewards.tobytes() == rewards.tobytes() and out.rewards.dtype == np.float32
    assert out.state == state and set(out.parts) == {"score"} and (out.advantage_scale == 1).all()
    assert out.metrics() == {"reward/score": pytest.approx(rewards.mean(), rel=1e-6)}


@pytest.mark.parametrize("seed", SEEDS)
def test_everything_at_once_equals_the_documented_order(seed):
    rewards, case = rollouts(seed)
    earlier = np.random.default_rng(1000 + seed).normal(0.0, 2.0, 9)
    out = shape(rewards, **case, spec=EVERYTHING, state=RunningNorm().updated(earlier))

    everything = [*earlier, *rewards.astype(float)]
    mean = sum(everything) / len(everything)
    std = (sum((x - mean) ** 2 for x in everything) / len(everything)) ** 0.5
    G = case["group_size"]
    for i in range(len(rewards)):
        group = case["lengths"][i // G * G : i // G * G + G]
        expected = min(max((float(rewards[i]) - mean) / std, -1.5), 1.5)
        if case["correct"][i] and case["texts"][i] in TEXTS[:2]:
            expected += 0.3
        if max(group) > min(group):
            share = 0.5 - (case["lengths"][i] - min(group)) / (max(group) - min(group))
            expected += 0.5 * (share if case["correct"][i] else min(0.0, share))
        if case["lengths"][i] > LIMIT - 5:
            expected += 2.0 * ((LIMIT - 5) - case["lengths"][i]) / 5
        if not case["stopped"][i]:
            expected -= 0.7
        assert out.rewards[i] == pytest.approx(expected, rel=1e-5, abs=1e-5)
        passed = case["correct"][i // G * G : i // G * G + G]
        assert out.advantage_scale[i] == pytest.approx(1 - sum(passed) / G, abs=1e-6)
    assert set(out.parts) == {"score", "format", "length", "overlong", "missing_eos"}
    np.testing.assert_allclose(sum(out.parts.values()), out.rewards, atol=1e-5)
    assert out.state.mean == pytest.approx(mean) and out.state.std == pytest.approx(std)


@pytest.mark.parametrize("seed", SEEDS)
def test_length_reward_is_that_of_kimi(seed):
    _, case = rollouts(seed)
    lengths, correct, G = case["lengths"], case["correct"], case["group_size"]
    got = length_reward(lengths, correct, G)
    for start in range(0, len(lengths), G):
        shortest, longest = min(lengths[start : start + G]), max(lengths[start : start + G])
        for i in range(start, start + G):
            if longest == shortest:
                assert got[i] == 0.0
                continue
            lam = 0.5 - (lengths[i] - shortest) / (longest - shortest)
            assert got[i] == pytest.approx(lam if correct[i] else min(0.0, lam))


def test_a_long_right_answer_stays_above_a_short_wrong_one():
    correct = np.array([True, False, True])
    total = correct + 1.9 * length_reward(np.array([9, 1, 5]), correct, 3)
    assert total[0] > 0 >= total[1] and total[2] > total[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_overlong_penalty_is_equation_13_of_dapo(seed):
    rng = np.random.default_rng(seed)
    limit = int(rng.integers(1, 40))
    cache = int(rng.integers(1, limit + 1))
    lengths = np.arange(0, limit + 5)
    got = overlong_penalty(lengths, max_length=limit, buffer=cache)
    for length, penalty in zip(lengths, got, strict=True):
        if length <= limit - cache:
            assert penalty == 0
        elif length <= limit:
            assert penalty == pytest.approx(((limit - cache) - length) / cache)
        else:
            assert penalty == -1


@pytest.mark.parametrize(
    ("text", "ends", "once"),
    [
        ("2+2=4\n#### 4", True, True),
        ("#### 4\n", True, True),
        ("#### 3\n#### 4", True, False),
        ("####3\n#### 4", True, False),
        ("####4", True, True),
        ("so #### 4", False, False),
        ("#### 4\nor so", False, False),
        ("#### ", False, False),
        ("", False, False),
    ],
)
def test_format_checks(text, ends, once):
    assert (FORMATS["final_line"](text), FORMATS["one_final_line"](text)) == (ends, once)


@pytest.mark.parametrize("pattern", sorted(FORMATS))
def test_gated_format_pays_only_right_answers_and_additive_all(pattern):
    case = {"lengths": np.ones(4), "stopped": np.ones(4, bool), "group_size": 4, "max_new_tokens": LIMIT}
    case |= {"texts": ["#### 1", "#### 2", "1", "2"], "correct": np.array([True, False, True, False])}
    rewards = case["correct"].astype(np.float32)
    for mode, paid in (("gated", [1, 0, 0, 0]), ("additive", [1, 1, 0, 0])):
        spec = Reward(format_mode=mode, format_coef=0.25, format_pattern=pattern)
        out = shape(rewards, **case, spec=spec, state=RunningNorm())
        assert out.parts["format"].tolist() == [0.25 * x for x in paid]


@pytest.mark.parametrize("seed", SEEDS)
def test_running_statistics_of_batches_are_those_of_all_scores(seed):
    rng = np.random.default_rng(seed)
    batches = [rng.normal(1e3, 1e-1, rng.integers(0, 7)) for _ in range(6)]
    state = RunningNorm()
    for batch in batches:
        state = RunningNorm(**json.loads(json.dumps(dataclasses.asdict(state.updated(batch)))))
    scores = np.concatenate(batches)
    assert state.count == len(scores)
    if len(scores) > 1:
        np.testing.assert_allclose([state.mean, state.std], [scores.mean(), scores.std()], rtol=1e-9)


@pytest.mark.parametrize("value", [0.1, -1000.1, 1e-9])
def test_equal_scores_have_no_spread_however_they_round(value):
    state = RunningNorm()
    for size in (3, 6, 7, 1, 11):
        state = state.updated(np.full(size, value))
        assert state.std == 1.0
    assert state.m2 > 0 or value != 0.1  # rounding there is


def test_equal_scores_normalise_to_zero_and_not_to_rounding_noise():
    state = RunningNorm()
    case = {"correct": np.zeros(6), "texts": [""] * 6, "lengths": np.ones(6), "stopped": np.ones(6)}
    for value in (0.1, 0.1, 0.1):
        out = shape(
            np.full(6, value, np.float32), **case, group_size=3, max_new_tokens=LIMIT,
            spec=Reward(normalize="running"), state=state,
        )  # fmt: skip
        state = out.state
        np.testing.assert_allclose(out.rewards, 0.0, atol=1e-6)
        assert (np.asarray(group_advantages(out.rewards, 3)) == 0).all()


def test_reference_statistics_stay_and_give_the_reference_mean_0_and_std_1():
    scores = np.random.default_rng(0).normal(5.0, 3.0, 8).astype(np.float32)
    case = {"correct": np.zeros(8), "texts": [""] * 8, "lengths": np.ones(8), "stopped": np.ones(8)}
    kwargs = {**case, "group_size": 4, "max_new_tokens": LIMIT, "spec": Reward(normalize="reference")}
    equal = shape(np.full(8, 0.1), **kwargs, state=RunningNorm())
    assert equal.state == RunningNorm(), "equal scores say nothing of their scale"
    np.testing.assert_allclose(equal.rewards, 0.0, atol=1e-6)
    out = shape(scores, **kwargs, state=equal.state)
    np.testing.assert_allclose([out.rewards.mean(), out.rewards.std()], [0, 1], atol=1e-5)
    again = shape(scores + 3, **kwargs, state=out.state)
    assert again.state == out.state and again.rewards.mean() > 0.5


def test_scores_are_clipped_after_normalising_and_before_penalties():
    case = {"correct": np.zeros(2), "texts": [""] * 2, "lengths": np.full(2, LIMIT), "stopped": np.zeros(2, bool)}
    spec = Reward(score_clip=1.0, normalize="reference", missing_eos_penalty=5.0)
    out = shape(
        np.array([100.0, 10.5]), **case, group_size=2, max_new_tokens=LIMIT, spec=spec,
        state=RunningNorm(10, 10.0, 10.0),
    )  # fmt: skip
    assert out.rewards.tolist() == [-4.0, -4.5]


@pytest.mark.parametrize("seed", SEEDS)
def test_difficulty_scales_whole_groups_by_pass_rate(seed):
    _, case = rollouts(seed)
    G = case["group_size"]
    groups = case["correct"].reshape(-1, G)
    for weighting in ("none", "fail_rate", "inverse_pass_rate"):
        got = advantage_scale(case["correct"], G, weighting).reshape(-1, G)
        for group, scale in zip(groups, got, strict=True):
            right = sum(map(int, group))
            expected = {"none": 1.0, "fail_rate": (G - right) / G, "inverse_pass_rate": G / max(right, 1)}
            np.testing.assert_allclose(scale, expected[weighting], rtol=1e-6)


def test_a_reward_that_is_not_finite_is_refused():
    rewards, case = rollouts(1)
    rewards[2] = np.nan
    with pytest.raises(ValueError, match="rewards: got nan at row 2, expected finite"):
        shape(rewards, **case, spec=Reward(), state=RunningNorm())
