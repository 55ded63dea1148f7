"""Proxy and gold against KL: the right points, in order, and poor data is drawn too."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from research.analysis.rl_plots import draw_reward_against_kl, reward_curve, write_reward_against_kl
from research.core.errors import DataError
from tests.objectives.cases import SEEDS


def rows(seed=0, steps=60):
    """Training records at each step, evaluations every third in records of their own."""
    rng = np.random.default_rng(seed)
    found = []
    for step in range(steps):
        kl = step / 10 + float(rng.normal(0, 0.05))
        found.append({"step": step, "loss": 0.0, "reward/mean": 0.1 * kl, "kl/reference": kl})
        if step % 3 == 0:
            found.append({"step": step, "reward/gold": 0.3 * kl - 0.06 * kl**2})
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_points_are_the_steps_that_have_both(seed):
    records = rows(seed, steps=int(np.random.default_rng(seed).integers(0, 20)))
    for reward in ("reward/mean", "reward/gold"):
        curve = reward_curve(records, reward=reward)
        kls = {r["step"]: r["kl/reference"] for r in records if "kl/reference" in r}
        expected = sorted((max(kls[r["step"]], 0.0), r[reward]) for r in records if reward in r)
        np.testing.assert_allclose(np.array(curve).T, np.array(expected).reshape(-1, 2))
        assert (np.diff(curve.kl) >= 0).all()


def test_what_is_not_finite_is_left_out():
    records = [
        {"step": 0, "reward/mean": "NaN", "kl/reference": 1.0},
        {"step": 1, "reward/mean": 0.5, "kl/reference": "Infinity"},
        {"step": 2, "reward/mean": 0.7, "kl/reference": 2.0},
    ]
    assert [values.tolist() for values in reward_curve(records, reward="reward/mean")] == [[2.0], [0.7]]


@pytest.mark.parametrize(("x", "of"), [("kl", lambda kl: kl), ("sqrt_kl", np.sqrt)])
def test_dots_are_the_points_and_each_run_has_two_lines_of_one_colour(x, of):
    axes = Figure().subplots()
    runs = {"grpo": rows(0), "ppo": rows(1)}
    draw_reward_against_kl(axes, runs, x=x)
    dots = [line for line in axes.lines if line.get_linestyle() == "None"]
    curves = [reward_curve(r, reward=m) for r in runs.values() for m in ("reward/mean", "reward/gold")]
    for line, curve in zip(dots, curves, strict=True):
        np.testing.assert_allclose(line.get_xdata(), of(curve.kl))
        np.testing.assert_allclose(line.get_ydata(), curve.reward)
    lines = [line for line in axes.lines if line.get_linestyle() != "None"]
    assert [line.get_label() for line in lines] == ["grpo: proxy", "grpo: gold", "ppo: proxy", "ppo: gold"]
    assert [line.get_linestyle() for line in lines] == ["-", "--"] * 2
    colors = [line.get_color() for line in lines]
    assert colors[0] == colors[1] != colors[2] == colors[3]


def test_the_line_is_a_running_mean_that_stays_among_the_points():
    axes = Figure().subplots()
    draw_reward_against_kl(axes, {"run": rows()}, x="kl")
    dots, line = axes.lines[:2]
    points = np.stack([dots.get_xdata(), dots.get_ydata()], axis=1)
    expected = [points[i : i + 6].mean(axis=0) for i in range(60 - 5)]
    np.testing.assert_allclose(np.stack([line.get_xdata(), line.get_ydata()], axis=1), expected)


@pytest.mark.parametrize(
    "runs",
    [
        {"one": rows()},
        {"no gold": [r for r in rows() if "reward/gold" not in r], "short": rows(1, steps=1)},
        {"nothing": []},
        {f"a run with quite a long name, number {i}": rows(i) for i in range(8)},
    ],
    ids=["one", "no gold", "nothing", "eight"],
)
def test_pictures_are_written_and_the_same_each_time(tmp_path, runs):
    path = write_reward_against_kl(runs, tmp_path / "kl.png")
    first = path.read_bytes()
    assert min(imread(path).shape[:2]) > 400
    assert write_reward_against_kl(runs, path).read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["kl.png"]


def test_a_picture_without_points_says_so():
    axes = Figure().subplots()
    draw_reward_against_kl(axes, {"nothing": []})
    assert [text.get_text() for text in axes.texts] == ["no step with reward and KL"]


def test_refusals(tmp_path):
    with pytest.raises(DataError, match="got no runs, expected at least one"):
        write_reward_against_kl({}, tmp_path / "kl.png")
    with pytest.raises(ValueError, match="x: got 'log_kl', expected one of kl, sqrt_kl"):
        draw_reward_against_kl(Figure().subplots(), {}, x="log_kl")
