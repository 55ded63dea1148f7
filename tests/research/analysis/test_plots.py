"""Plots: all four exist, are pictures, show the right numbers, and survive poor data."""

import dataclasses

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from research.analysis.figures import CONTROL_COLOR
from research.analysis.formatting import MetricFormat
from research.analysis.plots import draw_bars, draw_curves, write_plots
from research.analysis.statistics import compare_arms
from tests.research.analysis.made_up import failed, results, run

METRIC = "eval/pass@1"
STYLE = MetricFormat(METRIC, percent=True, higher_is_better=True)


def _compare(runs, control="sft"):
    return compare_arms(runs, metric=METRIC, control=control)


def test_pictures_are_written_and_the_same_each_time(tmp_path):
    runs = results()
    paths = write_plots(runs, _compare(runs), STYLE, tmp_path)
    first = {name: path.read_bytes() for name, path in paths.items()}
    assert set(first) == {"bars", "curves", "tokens", "summary"}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths.values())
    for path in paths.values():
        picture = imread(path)
        assert min(picture.shape[:2]) > 400
        assert len(np.unique(picture[..., :3].sum(axis=-1))) > 100
    again = write_plots(runs, _compare(runs), STYLE, tmp_path)
    assert {name: path.read_bytes() for name, path in again.items()} == first


def test_bars_show_means_seeds_and_control():
    comparison = _compare(results())
    axes = Figure().subplots()
    draw_bars(axes, comparison, STYLE)
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], [s.mean for s in comparison.arms])
    dots = [line for line in axes.lines if line.get_marker() in "os^Dv" and len(line.get_xdata()) == 3]
    for line, summary in zip(dots, comparison.arms, strict=True):
        np.testing.assert_allclose(line.get_xdata(), list(summary.values.values()))
    assert [text.get_text() for text in axes.get_yticklabels()][0] == "sft\n(control)"
    lowest, highest = axes.get_xlim()
    assert lowest == 0.0 and highest > max(s.t_interval.high for s in comparison.arms)


def test_curves_average_over_steps_that_all_seeds_have():
    runs = [run("sft", 0, 0.4), run("sft", 1, 0.5), run("grpo", 0, 0.6)]
    runs[1] = dataclasses.replace(runs[1], curve=runs[1].curve[::2])
    axes = Figure().subplots()
    draw_curves(axes, runs, _compare(runs), STYLE, x="step")
    steps = axes.lines[0].get_xdata()
    np.testing.assert_array_equal(steps, [point["step"] for point in runs[1].curve])
    by_step = {point["step"]: point[METRIC] for point in runs[0].curve}
    expected = [(by_step[point["step"]] + point[METRIC]) / 2 for point in runs[1].curve]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), expected)


def test_arms_keep_their_colours_across_plots():
    runs = results()
    bars, curves = Figure().subplots(), Figure().subplots()
    draw_bars(bars, _compare(runs), STYLE)
    draw_curves(curves, runs, _compare(runs), STYLE, x="tokens_spent")
    shared = [line.get_color() for line in curves.lines]
    assert [bar.get_edgecolor()[:3] for bar in bars.patches] == [_rgb(color) for color in shared]
    assert shared[0] == CONTROL_COLOR and len(set(shared)) == 4


def _rgb(color):
    return tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))


@pytest.mark.parametrize(
    "runs",
    [
        [run("sft", 0, 0.4)],
        [failed(result) for result in results()],
        [failed(run("sft", 0, 0.4)), run("grpo", 0, 0.5)],
        [run("sft", 0, 0.0), run("grpo", 0, 0.0)],
        [dataclasses.replace(result, curve=[]) for result in results()],
        [run(f"arm_{i}_with_quite_a_long_name", seed, 0.1 * i) for i in range(9) for seed in range(2)],
    ],
    ids=["one run", "all failed", "control failed", "zeros", "no curves", "nine arms"],
)
def test_poor_data_is_drawn_too(tmp_path, runs):
    paths = write_plots(runs, _compare(runs, control=runs[0].arm), STYLE, tmp_path)
    assert all(path.stat().st_size > 5000 for path in paths.values())
