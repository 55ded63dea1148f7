"""Panels with a row for each arm: its seeds, mean and interval, and the number in a column of its own."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from research.analysis.curves import arm_look, number_axis
from research.analysis.figures import FAINT, INK, SOFT, drawable, dress
from research.analysis.formatting import MetricFormat
from research.analysis.statistics import Comparison, Interval, Seeds

_ALL, _SHARES = Interval(-math.inf, math.inf), Interval(0.0, 1.0)
REACH = 0.75
"""An axis shows intervals up to this many ranges of the data beyond the data; a longer one ends in an arrow."""


def draw_values(axes: Axes, comparison: Comparison, style: MetricFormat) -> None:
    """Every arm's final values beside its name; a dashed line at the control's mean."""
    dress(axes, f"Final {style.name}", "mean, 95% t-interval, seeds · dashed: control")
    arms = comparison.arms
    texts = [style.value(s.mean) if s.values else "failed" if s.failed else "no result" for s in arms]
    # A t-interval does not know that shares end at 0 and 1.
    _draw(axes, list(zip(arms, texts, strict=True)), arms[0].mean, style, _SHARES if style.percent else _ALL)
    names = drawable([summary.arm for summary in arms], 34)
    axes.set_yticks(range(len(names)), [f"{names[0]}\n(control)", *names[1:]], fontsize=10)
    axes.set_xlabel(style.label)


def draw_differences(axes: Axes, comparison: Comparison, style: MetricFormat) -> None:
    """Every arm's paired difference to the control; a dashed line at 0."""
    dress(axes, "Difference to the control", "paired by seed: mean, 95% t-interval, seeds")
    rows = [(d, style.difference(d.mean) if d.values else "") for d in comparison.differences]
    _draw(axes, [(None, "control"), *rows], 0.0, style, _ALL)
    axes.set_xlabel(f"difference{' (percentage points)' if style.percent else ''}")


def _draw(
    axes: Axes, rows: Sequence[tuple[Seeds | None, str]], line: float | None, style: MetricFormat, possible: Interval
) -> None:
    """A row for each; one without values has its text only, which says why."""
    points = [list(row.values.values()) if row else [] for row, _ in rows]
    data = [*itertools.chain(*points), *([] if line is None else [line])]
    low, high = (min(data), max(data)) if data else (0.0, 1.0)
    room = REACH * ((high - low) or abs(high) or 1.0)
    shown = [low, high]
    if line is not None:
        axes.axvline(line, color=SOFT, linestyle=(0, (4, 3)), linewidth=1.0, zorder=1)
    for place, ((row, text), values) in enumerate(zip(rows, points, strict=True)):
        axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center", ha="left", color=INK,
                  fontsize=10, fontweight="bold" if values else "normal")  # fmt: skip
        if row is None or not values:
            continue
        color, marker, _ = arm_look(place)
        if (interval := row.t_interval) is not None:
            ends = (
                (max(interval.low, possible.low), low - room, "<"),
                (min(interval.high, possible.high), high + room, ">"),
            )
            left, right = max(ends[0][:2]), min(ends[1][:2])
            axes.plot([left, right], [place, place], color=color, linewidth=2.2, alpha=0.75, zorder=2)
            for (end, _, arrow), at in zip(ends, (left, right), strict=True):
                axes.plot(at, place, marker="|" if end == at else arrow, markersize=9 if end == at else 7,
                          color=color, markeredgewidth=2 if end == at else 0, zorder=2)  # fmt: skip
                shown.append(at)
        offsets = np.linspace(-0.17, 0.17, len(values)) if len(values) > 1 else np.zeros(1)
        axes.plot(values, place + offsets, linestyle="none", marker=marker, markersize=5, color=color,
                  markeredgecolor="white", markeredgewidth=0.6, alpha=0.8, zorder=3)  # fmt: skip
        axes.plot(np.mean(values), place, marker="|", markersize=17, markeredgewidth=2.4, color=INK, zorder=4)
    margin = 0.05 * ((max(shown) - min(shown)) or 1.0)
    axes.set_xlim(min(shown) - margin, max(shown) + margin)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [""] * len(rows))
    axes.tick_params(axis="y", length=0)
    number_axis(axes, "x", style.percent)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
