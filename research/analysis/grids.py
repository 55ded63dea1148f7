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
from research.analysis.figures import CONTROL_COLOR, FAINT, INK, PALETTE, drawable, dress, panels
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
    points = {arm: {key: grid[key] for key in varied if key in grid} for arm, grid in found.items()}
    return points if varied else {}


def draw_grid(points: Points, comparison: Comparison, style: MetricFormat) -> Figure:
    """One figure: a line plot for one key, else a heat map for each pair of keys, at most three in a row."""
    keys = list(dict.fromkeys(key for grid in points.values() for key in grid))
    if len(keys) == 1:
        figure, (axes,) = panels(1, columns=1, width=7.0, height=4.4)
        _draw_line(axes, keys[0], points, comparison, style)
        return figure
    pairs = list(itertools.combinations(keys, 2))
    size = max(4.6, 1.9 + 0.75 * max(len(_values(key, points)) for key in keys))
    figure, places = panels(len(pairs), columns=3, width=size + 0.9, height=size)
    for axes, pair in zip(places, pairs, strict=True):
        _draw_heat_map(axes, pair, points, comparison, style)
        dress(axes, style.name, "mean over seeds" + (" and over the other keys" if len(keys) > 2 else ""))
        axes.spines[:].set_visible(False)
    return figure


def _arms_at(where: Mapping[str, Any], points: Points, comparison: Comparison) -> list[ArmSummary]:
    """The arms whose keys have these values."""
    return [s for s in comparison.arms if s.arm in points and where.items() <= points[s.arm].items()]


def _draw_heat_map(
    axes: Axes, keys: tuple[str, str], points: Points, comparison: Comparison, style: MetricFormat
) -> None:
    """A cell is the mean over the arms that lie in it, which differ in the other keys."""
    columns, rows = (_values(key, points) for key in keys)
    everyone = [s.mean for s in comparison.arms if s.arm in points and s.mean is not None]
    span = Normalize(min(everyone), max(everyone)) if everyone else Normalize(0.0, 1.0)
    cells = np.full((len(rows), len(columns)), np.nan)
    for (row, up), (column, across) in itertools.product(enumerate(rows), enumerate(columns)):
        arms = _arms_at({keys[0]: across, keys[1]: up}, points, comparison)
        means = [summary.mean for summary in arms if summary.mean is not None]
        failed = sum(summary.failed for summary in arms)
        text, color = "failed" if failed else NOTHING, INK
        if means:
            cells[row, column] = mean = float(np.mean(means))
            text = style.value(mean) + (f"\n({failed} failed)" if failed else "")
            color = "white" if span(mean) < 0.55 else INK
        text += "\ncontrol" if comparison.control in {summary.arm for summary in arms} else ""
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color=color)
    colors = matplotlib.colormaps["viridis"].with_extremes(bad="#f1f1f1")
    axes.imshow(np.ma.masked_invalid(cells), cmap=colors, norm=span, origin="lower", aspect="auto")
    axes.tick_params(length=0)
    axes.set_xticks(range(len(columns)), _labels(columns))
    axes.set_yticks(range(len(rows)), _labels(rows))
    axes.set_xlabel(drawable([keys[0]], 44)[0])
    axes.set_ylabel(drawable([keys[1]], 44)[0])


def _draw_line(axes: Axes, key: str, points: Points, comparison: Comparison, style: MetricFormat) -> None:
    values = _values(key, points)
    line: dict[int, float] = {}
    look: dict[str, Any] = {"color": PALETTE[0], "alpha": 0.6}
    for x, value in enumerate(values):
        for summary in _arms_at({key: value}, points, comparison)[:1]:
            if summary.mean is not None:
                line[x] = summary.mean
            elif summary.failed:
                axes.annotate("failed", (x, 0), (0, 6), xycoords=axes.get_xaxis_transform(), ha="center",
                              textcoords="offset points", color=INK, fontsize=9)  # fmt: skip
            seeds = list(summary.values.values())
            axes.plot([x] * len(seeds), seeds, linestyle="none", marker="o", markersize=4.5, **look)
            if (interval := summary.t_interval) is not None:
                axes.plot([x, x], [interval.low, interval.high], marker="_", markersize=8, **look)
    axes.plot(list(line), list(line.values()), color=PALETTE[0], linewidth=2.0, marker="s", markersize=6)
    title = f"{style.name} over {drawable([key], 40)[0]}"
    dress(axes, title, "mean, 95% t-interval, seeds · dashed: control")
    if (control := comparison.arms[0].mean) is not None:
        axes.axhline(control, color=CONTROL_COLOR, linestyle=(0, (4, 3)), linewidth=1.0, zorder=1)
    axes.set_xticks(range(len(values)), _labels(values))
    axes.set_xlim(-0.4, len(values) - 0.6)
    axes.set_xlabel(drawable([key], 60)[0])
    axes.set_ylabel(style.label)
    number_axis(axes, "y", style.percent)
    axes.grid(color=FAINT, linewidth=0.8)


def _values(key: str, points: Points) -> list[Any]:
    """A key's values: numbers in order of size, anything else in order of the arms."""
    found = [grid[key] for grid in points.values() if key in grid]
    found = [value for place, value in enumerate(found) if value not in found[:place]]
    return sorted(found) if all(isinstance(value, int | float) for value in found) else found


def _labels(values: Sequence[Any]) -> list[str]:
    return drawable([f"{v:g}" if isinstance(v, float) and math.isfinite(v) else str(v) for v in values], 14)
