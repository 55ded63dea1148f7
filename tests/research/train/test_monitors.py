"""Monitors: trends against a textbook regression, alarms that sound when they should and not on noise."""

import json
import math

import numpy as np
import pytest

from research.train import monitors
from research.train.monitors import ALARMS, Monitors, is_reward_hacking, slope_in_errors
from tests.objectives.cases import SEEDS

RIGHT, WRONG = "completions/mean_length_right", "completions/mean_length_wrong"


def run(columns):
    """Alarms of each iteration."""
    watch, length = Monitors(), len(next(iter(columns.values())))
    return [watch.update({k: v[i] for k, v in columns.items()}) for i in range(length)]


def raised(alarms, name):
    return [found.get(f"alarm/{name}") for found in alarms]


def hacking(proxy, gold):
    return raised(run({"reward/mean": proxy, "reward/gold": gold}), "reward_hacking")


@pytest.mark.parametrize("seed", SEEDS)
def test_slope_is_that_of_the_textbook(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 30))
    y = [float(v) for v in rng.normal(rng.normal() * 10, 1, n) + rng.normal() * 0.2 * np.arange(n)]
    x_mean, y_mean = (n - 1) / 2, sum(y) / n
    spread = sum((i - x_mean) ** 2 for i in range(n))
    slope = sum((i - x_mean) * (y[i] - y_mean) for i in range(n)) / spread
    left = sum((y[i] - y_mean - slope * (i - x_mean)) ** 2 for i in range(n))
    assert slope_in_errors(y) == pytest.approx(slope / math.sqrt(left / (n - 2) / spread), rel=1e-6)
    assert slope_in_errors(y[::-1]) == pytest.approx(-slope_in_errors(y))
    assert slope_in_errors([1e3 * v for v in y]) == pytest.approx(slope_in_errors(y))


def test_slope_of_exact_lines():
    assert slope_in_errors([0.1] * 20) == 0.0
    assert slope_in_errors([0.0] * 20) == 0.0
    assert slope_in_errors([float(i) for i in range(20)]) > 1e6
    assert slope_in_errors([-0.1 * i for i in range(20)]) < -1e6


@pytest.mark.parametrize("seed", SEEDS)
def test_hacking_is_found_within_a_window_of_the_turn(seed):
    rng = np.random.default_rng(seed)
    steps = np.arange(80)
    proxy = 0.01 * steps + rng.normal(0, 0.03, 80)
    gold = np.where(steps < 40, 0.01 * steps, 0.8 - 0.01 * steps) + rng.normal(0, 0.03, 80)
    flags = hacking(proxy, gold)
    assert not any(flags[:40]) and any(flags[40:70])


def test_noise_and_honest_learning_raise_no_hacking_alarm():
    rng = np.random.default_rng(0)
    assert sum(any(hacking(rng.normal(0, 1, 100), rng.normal(0, 1, 100))) for _ in range(60)) <= 1
    steps = np.arange(100)
    for gold in (0.01 * steps, 0 * steps, -0.01 * steps):
        for proxy in (0 * steps, -0.01 * steps) if gold[-1] < 0 else (0.01 * steps, 0 * steps):
            assert not any(hacking(proxy, gold))


def test_hacking_needs_both_trends_beyond_the_margin():
    up, down = [0.0, 1.0, 1.5, 3.0, 4.0, 4.5], [5.0, 4.0, 4.2, 2.0, 1.0, 1.2]
    assert is_reward_hacking(up, down)
    assert not is_reward_hacking(up, up) and not is_reward_hacking(down, down) and not is_reward_hacking(down, up)
    noisy = [0.0, 3.0, -1.0, 4.0, 1.0, 2.0]
    assert not is_reward_hacking(noisy, down) and not is_reward_hacking(up, noisy)


def test_without_gold_nothing_is_said_of_hacking_and_the_window_waits():
    watch = Monitors()
    for i in range(monitors.WINDOW):
        assert "alarm/reward_hacking" not in watch.update({"reward/mean": float(i)})
        found = watch.update({"reward/mean": float(i), "reward/gold": -float(i)})
        assert found["alarm/reward_hacking"] == float(i == monitors.WINDOW - 1)


def test_entropy_collapse_is_relative_to_the_start():
    entropy = [2.0] * 5 + [0.5] * 10 + [0.1] * 10
    flags = raised(run({"entropy": entropy}), "entropy_collapse")
    expected = [float(i >= 10 and np.mean(entropy[i - 4 : i + 1]) < 0.2) for i in range(25)]
    assert flags == expected and sum(flags) == 7.0
    assert raised(run({"entropy": [0.0] * 20}), "entropy_collapse") == [0.0] * 20


def test_wrong_answers_that_grow_relative_to_right_ones():
    steady = run({RIGHT: [10.0] * 20, WRONG: [20.0] * 20})
    both = run({RIGHT: np.arange(10, 50), WRONG: 2 * np.arange(10, 50)})
    drift = run({RIGHT: [10.0] * 20, WRONG: [20.0] * 5 + [40.0] * 15})
    assert not any(raised(steady, "wrong_length")) and not any(raised(both, "wrong_length"))
    assert raised(drift, "wrong_length") == [0.0] * 9 + [1.0] * 11
    assert Monitors().update({WRONG: 3.0}) == {}


@pytest.mark.parametrize(
    ("name", "below", "above"), [("truncated", 0.25, 0.26), ("zero_std", 0.9, 0.95), ("gap", 0.1, 0.11)]
)
def test_bounds(name, below, above):
    metric, watch = monitors.BOUNDS[name][0], Monitors()
    assert watch.update({metric: np.float32(below / 2), "loss": 9.0}) == {f"alarm/{name}": 0.0}
    assert watch.update({metric: below}) == {f"alarm/{name}": 0.0}
    assert watch.update({metric: above}) == {f"alarm/{name}": 1.0}
    for missing in (math.nan, math.inf):
        assert watch.update({metric: missing}) == {}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_resumed_run_raises_the_same_alarms_and_its_state_stays_small(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    for name, value in {"WINDOW": 6, "SMOOTH": 3, "MARGIN": 1.0, "LEAST_ENTROPY": 0.9, "MOST_GROWTH": 1.1}.items():
        monkeypatch.setattr(monitors, name, value)
    names = ["reward/mean", "reward/gold", "entropy", RIGHT, WRONG, *(metric for metric, _ in monitors.BOUNDS.values())]
    readings = [{n: float(rng.random()) for n in names if rng.random() >= 0.1} for _ in range(30)]
    whole = Monitors()
    expected = [whole.update(reading) for reading in readings]
    cut = int(rng.integers(0, 30))
    first, second = Monitors(), Monitors()
    assert [first.update(reading) for reading in readings[:cut]] == expected[:cut]
    kept = first.get_state()
    saved = json.dumps(kept)
    first.update(readings[cut])
    assert json.dumps(kept) == saved, "a state that was handed out does not change"
    second.set_state(json.loads(saved))
    assert [second.update(reading) for reading in readings[cut:]] == expected[cut:]
    assert second.get_state() == whole.get_state()
    assert len(json.dumps(whole.get_state())) < 1000
    assert {name for found in expected for name in found} == set(ALARMS)
