"""Pictures of a grid of arms: a line over one key, a heat map for each pair of keys."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from research.analysis.curves import number_axis
from research.analysis.figures import CONTROL_COLOR, FAINT, INK, PALETTE, blank_figure, drawable, dress
from research.analysis.formatting import NOTHING, MetricFormat
from research.analysis.results import RunResult
from research.analysis.statistics import ArmSummary, Comparison

Points = Mapping[str, Mapping[str, Any]]
"""Arm -> dotted key -> value."""


def grid_points(results: Sequence[RunResult]) -> Points:
    """The arms that are points of a grid; of the keys, those that differ between them."""
    found = {run.arm: run.grid for run in results if run.grid}
    keys = dict.fromkeys(key for grid in found.values() for key in grid)
    varied = [key for key in keys if len({str(grid.get(key)) for grid in found.values()}) > 1]
    return (
        {arm: {key: grid[key] for key in varied if key in grid} for arm, grid in found.items()}
        if varied
        else {}
    )


def draw_grid(points: Points, comparison: Comparison, style: MetricFormat) -> Figure:
    """One figure: a line plot for one key, else a heat map for each pair of keys, at most three in a row.

    A cell is the mean over the arms that lie in it, which differ in the other keys.
    """
    summaries = {summary.arm: summary for summary in comparison.arms if summary.arm in points}
    keys = list(dict.fromkeys(key for grid in points.values() for key in grid))
    if len(keys) == 1:
        figure = blank_figure(7.0, 4.4)
        _draw_line(figure.subplots(), keys[0], points, summaries, comparison, style)
        return figure
    pairs = list(itertools.combinations(keys, 2))
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    widest = max(len(_values(key, points)) for key in keys)
    size = max(4.6, 1.9 + 0.75 * widest)
    figure = blank_figure(columns * (size + 0.9), rows * size)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    means = [summary.mean for summary in summaries.values() if summary.mean is not None]
    span = Normalize(min(means), max(means)) if means else Normalize(0.0, 1.0)
    for axes, pair in zip(panels, pairs, strict=False):
        _draw_heat_map(axes, pair, points, summaries, comparison.control, style, span, len(keys) > 2)
    for axes in panels[len(pairs) :]:
        axes.set_axis_off()
    return figure


def _draw_heat_map(
    axes: Axes,
    keys: tuple[str, str],
    points: Points,
    summaries: Mapping[str, ArmSummary],
    control: str,
    style: MetricFormat,
    span: Normalize,
    averaged: bool,
) -> None:
    across, up = keys
    columns, rows = _values(across, points), _values(up, points)
    cells = np.full((len(rows), len(columns)), np.nan)
    notes: dict[tuple[int, int], str] = {}
    for row, column in itertools.product(range(len(rows)), range(len(columns))):
        arms = [a for a, g in points.items() if g.get(across) == columns[column] and g.get(up) == rows[row]]
        found = [summaries[arm] for arm in arms if arm in summaries]
        means = [summary.mean for summary in found if summary.mean is not None]
        failed = sum(summary.failed for summary in found)
        notes[row, column] = "failed" if failed and not means else NOTHING
        if means:
            cells[row, column] = np.mean(means)
            notes[row, column] = style.value(cells[row, column]) + (f"\n({failed} failed)" if failed else "")
        if control in arms:
            notes[row, column] += "\ncontrol"
    colors = matplotlib.colormaps["viridis"].with_extremes(bad="#f1f1f1")
    axes.imshow(np.ma.masked_invalid(cells), cmap=colors, norm=span, origin="lower", aspect="auto")
    for (row, column), text in notes.items():
        dark = np.isfinite(cells[row, column]) and span(cells[row, column]) < 0.55
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else INK)  # fmt: skip
    dress(axes, style.name, "mean over seeds" + (" and over the other keys" if averaged else ""))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks(range(len(columns)), drawable([_text(v) for v in columns], 14))
    axes.set_yticks(range(len(rows)), drawable([_text(v) for v in rows], 14))
    axes.set_xlabel(drawable([across], 44)[0])
    axes.set_ylabel(drawable([up], 44)[0])


def _draw_line(
    axes: Axes,
    key: str,
    points: Points,
    summaries: Mapping[str, ArmSummary],
    comparison: Comparison,
    style: MetricFormat,
) -> None:
    values, line = _values(key, points), []
    for x, value in enumerate(values):
        arms = [arm for arm, grid in points.items() if grid.get(key) == value and arm in summaries]
        summary = summaries[arms[0]] if arms else None
        if summary is None or summary.mean is None:
            if summary is not None and summary.failed:
                axes.annotate("failed", (x, 0), (0, 6), xycoords=axes.get_xaxis_transform(), ha="center",
                              textcoords="offset points", color=INK, fontsize=9)  # fmt: skip
            continue
        line.append((x, summary.mean))
        axes.plot([x] * len(summary.values), list(summary.values.values()), linestyle="none", marker="o",
                  markersize=4.5, color=PALETTE[0], alpha=0.5, markeredgewidth=0)  # fmt: skip
        if summary.t_interval is not None:
            axes.plot([x, x], [summary.t_interval.low, summary.t_interval.high], color=PALETTE[0], alpha=0.6,
                      linewidth=1.6, marker="_", markersize=8)  # fmt: skip
    axes.plot(
        *np.array(line or np.empty((0, 2))).T, color=PALETTE[0], linewidth=2.0, marker="s", markersize=6
    )
    dress(
        axes, f"{style.name} over {drawable([key], 40)[0]}", "mean, 95% t-interval, seeds · dashed: control"
    )
    if comparison.arms[0].mean is not None:
        axes.axhline(
            comparison.arms[0].mean, color=CONTROL_COLOR, linestyle=(0, (4, 3)), linewidth=1.0, zorder=1
        )
    axes.set_xticks(range(len(values)), drawable([_text(v) for v in values], 14))
    axes.set_xlim(-0.4, len(values) - 0.6)
    axes.set_xlabel(drawable([key], 60)[0])
    axes.set_ylabel(style.label)
    number_axis(axes, "y", style.percent)
    axes.grid(color=FAINT, linewidth=0.8)


def _values(key: str, points: Points) -> list[Any]:
    """A key's values: numbers in order of size, anything else in order of the arms."""
    found: list[Any] = []
    for grid in points.values():
        if key in grid and grid[key] not in found:
            found.append(grid[key])
    numeric = all(isinstance(value, int | float) for value in found)
    return sorted(found) if numeric else found


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)
