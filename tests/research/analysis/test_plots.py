"""Plots: what there is to draw is drawn, shows the right numbers, and poor data is drawn too."""

import dataclasses

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from research.analysis.curves import draw_curves, draw_training, training_metrics
from research.analysis.figures import CONTROL_COLOR, drawable, panel_title
from research.analysis.formatting import MetricFormat
from research.analysis.grids import draw_grid, grid_points
from research.analysis.intervals import draw_differences, draw_values
from research.analysis.logs import Evidence
from research.analysis.plots import write_plots
from research.analysis.statistics import compare_arms
from tests.research.analysis.made_up import failed, log, results, run

METRIC = "eval/pass@1"
STYLE = MetricFormat(METRIC, percent=True, higher_is_better=True)


def _compare(runs, control="sft"):
    return compare_arms(runs, metric=METRIC, control=control)


def _evidence(runs, logs=None):
    return Evidence(runs, logs or {}, [])


def test_pictures_are_written_and_the_same_each_time_in_every_format(tmp_path):
    runs = results()
    evidence = _evidence(runs, {(run.arm, run.seed): log(run.seed, steps=12) for run in runs})
    kinds = ("png", "pdf", "svg")
    paths = write_plots(evidence, _compare(runs), STYLE, tmp_path, kinds)
    assert set(paths) == {"summary", "curves", "training", "reward_against_kl"}
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {f"{name}.{kind}" for name in paths for kind in kinds}
    for path in paths.values():
        picture = imread(path)
        assert min(picture.shape[:2]) > 400
        assert len(np.unique(picture[..., :3].sum(axis=-1))) > 100
    write_plots(evidence, _compare(runs), STYLE, tmp_path, kinds)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def _marks(axes):
    """The seeds' points by row: the lines of more than one point that are not intervals."""
    return [line for line in axes.lines if line.get_linestyle() == "None" and len(line.get_xdata()) == 3]


def test_values_and_differences_are_shown_by_row():
    comparison = _compare(results())
    left, right = Figure().subplots(1, 2)
    draw_values(left, comparison, STYLE)
    draw_differences(right, comparison, STYLE)
    for line, summary in zip(_marks(left), comparison.arms, strict=True):
        np.testing.assert_allclose(line.get_xdata(), list(summary.values.values()))
    for line, difference in zip(_marks(right), comparison.differences, strict=True):
        np.testing.assert_allclose(line.get_xdata(), list(difference.values.values()))
    assert [text.get_text() for text in left.get_yticklabels()][:2] == ["sft\n(control)", "rejection_sampling"]
    numbers = [text.get_text() for text in right.texts[1:]]
    assert numbers == ["control", *(STYLE.difference(d.mean) for d in comparison.differences)]


def test_axes_are_zoomed_to_the_data_and_numbers_stand_beside_them():
    comparison = _compare(results())
    axes = Figure().subplots()
    draw_values(axes, comparison, STYLE)
    lowest, highest = axes.get_xlim()
    ends = [(s.t_interval.low, s.t_interval.high) for s in comparison.arms]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    assert low - 0.1 * (high - low) < lowest < low and high < highest < high + 0.1 * (high - low)
    column = [text.get_position()[0] for text in axes.texts[1:]]  # the first is the subtitle
    assert column == [1.02] * 4  # of the axes' width: outside, where no line runs


def test_an_interval_far_wider_than_the_data_ends_in_an_arrow():
    runs = [run(arm, seed, a + 0.01 * seed * (i + 1)) for i, (arm, a) in enumerate({"sft": 0.5, "dpo": 0.5}.items())
            for seed in (0, 1)]  # fmt: skip
    axes = Figure().subplots()
    draw_values(axes, _compare(runs), STYLE)
    assert {line.get_marker() for line in axes.lines} >= {"<", ">"}
    lowest, highest = axes.get_xlim()
    assert highest - lowest < 3 * 0.02


def test_a_failed_arm_has_no_number():
    runs = [*results(), failed(run("bad", 0, 0.9))]
    for draw in (draw_values, draw_differences):
        axes = Figure().subplots()
        draw(axes, _compare(runs), STYLE)
        assert axes.texts[-1].get_text() in ("failed", "") and len(_marks(axes)) in (3, 4)
        assert axes.get_xlim()[1] < 0.75


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
    values, curves = Figure().subplots(), Figure().subplots()
    draw_values(values, _compare(runs), STYLE)
    draw_curves(curves, runs, _compare(runs), STYLE, x="tokens_spent")
    shared = [line.get_color() for line in curves.lines]
    assert [to_hex(line.get_color()) for line in _marks(values)] == [color.lower() for color in shared]
    assert shared[0] == CONTROL_COLOR and len(set(shared)) == 4


def test_training_curves_are_running_means_over_seeds():
    runs = results()
    logs = {(r.arm, r.seed): log(r.seed, steps=40) for r in runs if r.arm == "grpo"}
    assert training_metrics(logs) == ["reward/mean", "kl/reference", "entropy", "completions/mean_length"]
    axes = Figure().subplots()
    draw_training(axes, logs, _compare(runs), "kl/reference")
    (line,) = axes.lines
    seeds = [[row["kl/reference"] for row in log(seed, steps=40) if "kl/reference" in row] for seed in range(3)]
    expected = [np.mean([values[i : i + 4] for values in seeds]) for i in range(37)]
    np.testing.assert_allclose(line.get_ydata(), expected)
    assert 1 < line.get_xdata()[0] < 4 and axes.get_ylabel() == "nats a completion"


def _grid(**keys):
    names = list(keys)
    points = [
        dict(zip(names, values, strict=True))
        for values in np.stack(np.meshgrid(*keys.values()), -1).reshape(-1, len(names)).tolist()
    ]
    return [
        dataclasses.replace(run(str(point), seed, 0.1 + 0.1 * place), grid=point)
        for place, point in enumerate(points)
        for seed in (0, 1)
    ]


def test_one_key_is_a_line_over_its_values():
    runs = _grid(beta=[0.1, 0.3, 0.01])
    figure = draw_grid(grid_points(runs), _compare(runs, control=runs[0].arm), STYLE)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.01", "0.1", "0.3"]
    np.testing.assert_allclose(axes.lines[-2].get_ydata(), [0.3, 0.1, 0.2])


def test_two_keys_are_a_heat_map_with_failed_and_missing_cells():
    runs = _grid(beta=[0.1, 0.2], rate=[1e-4, 1e-3, 1e-2])
    runs = [
        failed(r) if r.grid == {"beta": 0.2, "rate": 1e-4} else r for r in runs if r.grid != {"beta": 0.2, "rate": 1e-2}
    ]
    (axes,) = draw_grid(grid_points(runs), _compare(runs, control=runs[0].arm), STYLE).axes
    cells = axes.images[0].get_array()
    expected = [[0.1, np.nan], [0.3, 0.4], [0.5, np.nan]]
    np.testing.assert_allclose(cells.filled(np.nan), expected)
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts[0, 0] == "10.0%\ncontrol" and texts[1, 0] == "failed" and texts[1, 2] == "–"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("beta", "rate")


def test_three_keys_are_a_heat_map_for_each_pair_over_the_mean_of_the_third():
    runs = _grid(a=[1, 2], b=[1, 2], c=[1, 2])
    figure = draw_grid(grid_points(runs), _compare(runs, control=runs[0].arm), STYLE)
    assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes] == [("a", "b"), ("a", "c"), ("b", "c")]
    means = {tuple(r.grid.values()): r.metrics[METRIC] for r in runs}
    cell = figure.axes[1].images[0].get_array()[1, 0]  # a = 1, c = 2
    np.testing.assert_allclose(cell, (means[1, 1, 2] + means[1, 2, 2]) / 2)


def test_a_key_that_does_not_vary_is_no_axis():
    runs = [dataclasses.replace(r, grid={**r.grid, "same": 7}) for r in _grid(beta=[0.1, 0.3])]
    assert {tuple(point) for point in grid_points(runs).values()} == {("beta",)}
    assert grid_points(results()) == {}


def test_long_names_stay_different_and_characters_without_a_glyph_are_spelled():
    names = drawable(["a" * 30 + "x" + "a" * 30, "a" * 30 + "y" + "a" * 30, "short", "你$x^$"], 20)
    assert max(map(len, names)) <= 24 and len(set(names)) == 4 and "…" in names[0]
    assert names[2:] == ["short", "\\u4f60$x^$"]


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
    paths = write_plots(_evidence(runs), _compare(runs, control=runs[0].arm), STYLE, tmp_path)
    assert all(path.stat().st_size > 5000 for path in paths.values())


def test_panels_of_a_grid_have_titles_that_differ() -> None:
    found = [panel_title(f"learning_rate={rate}, beta=0.05") for rate in ("0.0001", "0.001")]
    assert found == ["learning_rate=0.0001,\nbeta=0.05", "learning_rate=0.001,\nbeta=0.05"]
