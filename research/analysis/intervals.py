"""Panels with a row for each arm: its seeds, mean and interval, and the number in a column of its own."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from research.analysis.curves import arm_look, number_axis
from research.analysis.figures import FAINT, INK, SOFT, drawable, dress
from research.analysis.formatting import MetricFormat
from research.analysis.statistics import Comparison, Interval

REACH = 0.75
"""An axis shows intervals up to this many ranges of the data beyond the data; a longer one ends in an arrow."""


class Row(NamedTuple):
    """What a row shows; without points, `text` says why."""

    points: Sequence[float]
    interval: Interval | None
    text: str


def draw_values(axes: Axes, comparison: Comparison, style: MetricFormat) -> None:
    """Every arm's final values; a dashed line at the control's mean."""
    dress(axes, f"Final {style.name}", "mean, 95% t-interval, seeds · dashed: control")
    rows = []
    for summary in comparison.arms:
        interval = summary.t_interval
        if interval is not None and style.percent:  # a t-interval does not know that shares end at 0 and 1
            interval = Interval(max(interval.low, 0.0), min(interval.high, 1.0))
        text = style.value(summary.mean) if summary.values else ("failed" if summary.failed else "no result")
        rows.append(Row(tuple(summary.values.values()), interval, text))
    _draw(axes, rows, comparison.arms[0].mean, style)
    axes.set_xlabel(style.label)


def draw_differences(axes: Axes, comparison: Comparison, style: MetricFormat) -> None:
    """Every arm's paired difference to the control; a dashed line at 0."""
    dress(axes, "Difference to the control", "paired by seed: mean, 95% t-interval, seeds")
    rows = [Row((), None, "control")]
    for difference in comparison.differences:
        text = style.difference(difference.mean) if difference.differences else ""
        rows.append(Row(tuple(difference.differences.values()), difference.t_interval, text))
    _draw(axes, rows, 0.0, style)
    axes.set_xlabel(f"difference{' (percentage points)' if style.percent else ''}")


def label_rows(axes: Axes, comparison: Comparison) -> None:
    """The arms' names beside the rows."""
    names = drawable([summary.arm for summary in comparison.arms], 34)
    axes.set_yticks(range(len(names)), [f"{names[0]}\n(control)", *names[1:]], fontsize=10)


def _draw(axes: Axes, rows: Sequence[Row], line: float | None, style: MetricFormat) -> None:
    data = [value for row in rows for value in row.points] + ([] if line is None else [line])
    low, high = (min(data), max(data)) if data else (0.0, 1.0)
    room = REACH * ((high - low) or abs(high) or 1.0)
    shown = [low, high]
    if line is not None:
        axes.axvline(line, color=SOFT, linestyle=(0, (4, 3)), linewidth=1.0, zorder=1)
    for place, row in enumerate(rows):
        axes.text(1.02, place, row.text, transform=axes.get_yaxis_transform(), va="center", ha="left", color=INK,
                  fontsize=10, fontweight="bold" if row.points else "normal")  # fmt: skip
        if not row.points:
            continue
        color, marker, _ = arm_look(place)
        if row.interval is not None:
            ends = (row.interval.low, low - room, "<"), (row.interval.high, high + room, ">")
            left, right = max(ends[0][:2]), min(ends[1][:2])
            axes.plot([left, right], [place, place], color=color, linewidth=2.2, alpha=0.75, zorder=2)
            for (end, limit, arrow), at in zip(ends, (left, right), strict=True):
                axes.plot(at, place, marker="|" if end == at else arrow, markersize=9 if end == at else 7,
                          color=color, markeredgewidth=2 if end == at else 0, zorder=2)  # fmt: skip
                shown.append(limit if end != at else end)
        offsets = np.linspace(-0.17, 0.17, len(row.points)) if len(row.points) > 1 else np.zeros(1)
        axes.plot(row.points, place + offsets, linestyle="none", marker=marker, markersize=5, color=color,
                  markeredgecolor="white", markeredgewidth=0.6, alpha=0.8, zorder=3)  # fmt: skip
        axes.plot(np.mean(row.points), place, marker="|", markersize=17, markeredgewidth=2.4, color=INK, zorder=4)
    margin = 0.05 * ((max(shown) - min(shown)) or 1.0)
    axes.set_xlim(min(shown) - margin, max(shown) + margin)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [""] * len(rows))
    axes.tick_params(axis="y", length=0)
    number_axis(axes, "x", style.percent)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
