"""Monitors: trends against a textbook regression, alarms that sound when they should and not on noise."""

import json
import math

import numpy as np
import pytest

from research.core.errors import ConfigError
from research.train.monitors import (
    ALARMS,
    METRICS,
    MonitorBounds,
    Monitors,
    Reading,
    is_reward_hacking,
    reading_of,
    slope_in_errors,
)
from tests.objectives.cases import SEEDS


def run(monitors, **columns):
    """Alarms of each iteration."""
    length = len(next(iter(columns.values())))
    return [monitors.update(Reading(**{k: v[i] for k, v in columns.items()})) for i in range(length)]


def raised(alarms, name):
    return [found.get(f"alarm/{name}") for found in alarms]


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
    assert slope_in_errors([0.1 * i for i in range(20)]) == math.inf
    assert slope_in_errors([-0.1 * i for i in range(20)]) == -math.inf
    with pytest.raises(ValueError, match="values: got 2, expected at least 3"):
        slope_in_errors([0.0, 1.0])


@pytest.mark.parametrize("seed", SEEDS)
def test_hacking_is_found_within_a_window_of_the_turn(seed):
    rng = np.random.default_rng(seed)
    steps = np.arange(80)
    proxy = 0.01 * steps + rng.normal(0, 0.03, 80)
    gold = np.where(steps < 40, 0.01 * steps, 0.8 - 0.01 * steps) + rng.normal(0, 0.03, 80)
    flags = raised(run(Monitors(MonitorBounds(window=20)), proxy=proxy, gold=gold), "reward_hacking")
    assert not any(flags[:40]) and any(flags[40:70])


def test_noise_and_honest_learning_raise_no_hacking_alarm():
    rng = np.random.default_rng(0)
    false = 0
    for _ in range(60):
        noise = run(Monitors(MonitorBounds()), proxy=rng.normal(0, 1, 100), gold=rng.normal(0, 1, 100))
        false += any(raised(noise, "reward_hacking"))
    assert false <= 1
    steps = np.arange(100)
    for gold in (0.01 * steps, 0 * steps, -0.01 * steps):
        for proxy in (0 * steps, -0.01 * steps) if gold[-1] < 0 else (0.01 * steps, 0 * steps):
            quiet = run(Monitors(MonitorBounds()), proxy=proxy, gold=gold)
            assert not any(raised(quiet, "reward_hacking"))


def test_hacking_needs_both_trends_beyond_the_margin():
    up, down = [0.0, 1.0, 1.5, 3.0, 4.0, 4.5], [5.0, 4.0, 4.2, 2.0, 1.0, 1.2]
    assert is_reward_hacking(up, down, 3.0)
    assert not is_reward_hacking(up, up, 3.0) and not is_reward_hacking(down, down, 3.0)
    assert not is_reward_hacking(down, up, 3.0) and not is_reward_hacking(up, down, 50.0)


def test_without_gold_nothing_is_said_of_hacking_and_the_window_waits():
    monitors = Monitors(MonitorBounds(window=4))
    for i in range(4):
        assert "alarm/reward_hacking" not in monitors.update(Reading(proxy=float(i)))
        found = monitors.update(Reading(proxy=float(i), gold=-float(i)))
        assert found["alarm/reward_hacking"] == float(i == 3)


def test_entropy_collapse_is_relative_to_the_start():
    entropy = [2.0] * 5 + [0.5] * 10 + [0.1] * 10
    flags = raised(run(Monitors(MonitorBounds(entropy_fraction=0.1)), entropy=entropy), "entropy_collapse")
    expected = [float(i >= 10 and np.mean(entropy[i - 4 : i + 1]) < 0.2) for i in range(25)]
    assert flags == expected and sum(flags) == 7.0
    off = raised(run(Monitors(MonitorBounds(entropy_fraction=0.0)), entropy=entropy), "entropy_collapse")
    assert off == [None] * 25
    zero = raised(run(Monitors(MonitorBounds()), entropy=[0.0] * 20), "entropy_collapse")
    assert zero == [0.0] * 20


def test_wrong_answers_that_grow_relative_to_right_ones():
    steady = run(Monitors(MonitorBounds()), length_right=[10.0] * 20, length_wrong=[20.0] * 20)
    both = run(Monitors(MonitorBounds()), length_right=np.arange(10, 50), length_wrong=2 * np.arange(10, 50))
    drift = run(Monitors(MonitorBounds()), length_right=[10.0] * 20, length_wrong=[20.0] * 5 + [40.0] * 15)
    assert not any(raised(steady, "wrong_length")) and not any(raised(both, "wrong_length"))
    assert raised(drift, "wrong_length") == [0.0] * 9 + [1.0] * 11
    assert "alarm/wrong_length" not in Monitors(MonitorBounds()).update(Reading(length_wrong=3.0))


@pytest.mark.parametrize(
    ("name", "bounds", "below", "above"),
    [
        ("truncated", MonitorBounds(truncated=0.25), 0.25, 0.26),
        ("zero_std", MonitorBounds(zero_std=0.9), 0.9, 0.95),
        ("gap", MonitorBounds(gap=0.1), 0.1, 0.11),
        ("kl", MonitorBounds(kl=5.0), 5.0, 5.1),
    ],
)
def test_bounds(name, bounds, below, above):
    monitors = Monitors(bounds)
    assert monitors.update(Reading(**{name: below})) == {f"alarm/{name}": 0.0}
    assert monitors.update(Reading(**{name: above})) == {f"alarm/{name}": 1.0}
    for missing in (None, math.nan, math.inf):
        assert monitors.update(Reading(**{name: missing})) == {}
    assert Monitors(MonitorBounds()).update(Reading(kl=1e9)) == {}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_resumed_run_raises_the_same_alarms_and_its_state_stays_small(seed):
    rng = np.random.default_rng(seed)
    bounds = MonitorBounds(window=6, smooth=3, margin=1.0, entropy_fraction=0.9, wrong_length=1.1)
    readings = [Reading(*(None if rng.random() < 0.1 else float(v) for v in rng.random(9))) for _ in range(30)]
    whole = Monitors(bounds)
    expected = [whole.update(reading) for reading in readings]
    cut = int(rng.integers(0, 30))
    first, second = Monitors(bounds), Monitors(bounds)
    assert [first.update(reading) for reading in readings[:cut]] == expected[:cut]
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert [second.update(reading) for reading in readings[cut:]] == expected[cut:]
    assert second.get_state() == whole.get_state()
    assert len(json.dumps(whole.get_state())) < 1000
    assert {name for found in expected for name in found} <= set(ALARMS)


def test_readings_come_from_metrics_by_name():
    metrics = {name: np.float32(i) for i, name in enumerate(METRICS.values())}
    assert reading_of({**metrics, "loss": 0.0}) == Reading(*map(float, range(9)))
    assert reading_of({"reward/mean": 1.0}) == Reading(proxy=1.0)
    assert set(METRICS) == set(Reading._fields)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"window": 3}, "window: got 3, expected at least 4"),
        ({"smooth": 0}, "smooth: got 0, expected at least 1"),
        ({"margin": -1.0}, "margin: got -1.0, expected a finite number >= 0"),
        ({"gap": float("nan")}, "gap: got nan, expected a finite number >= 0"),
    ],
)
def test_bounds_out_of_range_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        MonitorBounds(**settings)
