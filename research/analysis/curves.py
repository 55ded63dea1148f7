"""Panels with a line for each arm: evaluations while training, and what was logged at every step."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from research.analysis.figures import CONTROL_COLOR, FAINT, MARKERS, PALETTE, drawable, dress, empty
from research.analysis.formatting import MetricFormat
from research.analysis.glossary import describe
from research.analysis.logs import Rows
from research.analysis.results import RunResult
from research.analysis.statistics import Comparison

LineStyle = Literal["-", "--", ":"]
LINES: tuple[LineStyle, ...] = ("-", "--", ":")
XAxis = Literal["step", "tokens_spent"]
Curve = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

TRAINING = (("reward/mean",), ("kl/reference", "kl_ref"), ("entropy", "sampler_entropy_estimate"),
            ("completions/mean_length",))  # fmt: skip
"""The panels of training: of each, the first metric that any run has logged."""


def draw_curves(
    axes: Axes,
    results: Sequence[RunResult],
    comparison: Comparison,
    style: MetricFormat,
    *,
    x: XAxis,
    only: str | None = None,
) -> None:
    """Each arm's mean over seeds, with the seeds' range as a band, against steps or tokens spent.

    Args:
      axes: where to.
      results: the runs.
      comparison: gives the order of the arms, and the seeds that have finished.
      style: how the metric is shown.
      x: the axis.
      only: this arm and the control, in a small panel with the arm's name.
    """
    if only is None:
        name = {"step": "while training", "tokens_spent": "against tokens spent"}[x]
        dress(axes, f"{style.name} {name}", "line: mean over seeds · band: lowest to highest seed")
        axes.set_xlabel({"step": "optimizer step", "tokens_spent": "tokens spent (sampled + trained)"}[x])
        axes.set_ylabel(style.label)
    else:
        dress(axes, drawable([only], 26)[0], "")
    drawn = False
    for place, summary in enumerate(comparison.arms):
        if only is not None and summary.arm not in (only, comparison.control):
            continue
        runs = [r for r in results if r.arm == summary.arm and r.seed in summary.values]
        points = [{p["step"]: (p[x], p[style.name]) for p in r.curve if style.name in p and x in p} for r in runs]
        curve = mean_curve(points)
        if curve is not None:
            drawn = True
            _draw_line(axes, place, curve)
    _finish(axes, drawn, "no evaluations while training", style.percent)
    if drawn and x == "tokens_spent":
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))


def training_metrics(logs: Mapping[tuple[str, int], Rows]) -> list[str]:
    """Which metrics of training there is something to draw of."""
    logged = {name for rows in logs.values() for row in rows for name in row}
    return [found for names in TRAINING if (found := next((n for n in names if n in logged), None))]


def draw_training(axes: Axes, logs: Mapping[tuple[str, int], Rows], comparison: Comparison, metric: str) -> None:
    """A logged metric of every arm: running means over a tenth of the steps, mean and range over seeds."""
    found = describe(metric)
    dress(axes, metric, "running mean over a tenth of the steps · band: lowest to highest seed")
    drawn = False
    for place, summary in enumerate(comparison.arms):
        runs = [logs[summary.arm, seed] for seed in summary.values if (summary.arm, seed) in logs]
        points = []
        for rows in runs:
            values = {row["step"]: row[metric] for row in rows if metric in row and np.isfinite(row[metric])}
            smooth = running_mean(np.array(list(values.values()), np.float64))
            late = len(values) - len(smooth)  # centred: as many steps are lost at either end
            steps = list(values)[late // 2 : late // 2 + len(smooth)]
            points.append({step: (step, value) for step, value in zip(steps, smooth, strict=True)})
        curve = mean_curve(points)
        if curve is not None:
            drawn = True
            _draw_line(axes, place, curve)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(found.unit if found else metric)
    _finish(axes, drawn, "not logged", percent=False)


def mean_curve(runs: Sequence[Mapping[float, tuple[float, float]]]) -> Curve | None:
    """x, mean, lowest and highest over the runs at the steps that all of them have; None without such.

    A step that only some seeds reached would shift the mean by who is in it.

    Args:
      runs: step -> (x, value).
    """
    steps = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
    if not steps:
        return None
    points = np.array([[run[step] for step in steps] for run in runs], dtype=np.float64)
    where, values = points[..., 0], points[..., 1]
    return where.mean(axis=0), values.mean(axis=0), values.min(axis=0), values.max(axis=0)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Means over a tenth of the points (at least 1), which neither lag nor bend at the ends."""
    width = max(1, len(values) // 10)
    return np.convolve(values, np.full(width, 1.0 / width), mode="valid") if len(values) else values


def arm_look(place: int) -> tuple[str, str, LineStyle]:
    """Colour, marker and line style of the arm in this place; the control is first."""
    if place == 0:
        return CONTROL_COLOR, "o", "-"
    turn, which = divmod(place - 1, len(PALETTE))
    return PALETTE[which], MARKERS[(which + turn) % len(MARKERS)], LINES[turn % len(LINES)]


def arm_handles(count: int) -> list[Line2D]:
    """The first `count` arms' marks, for a legend."""
    looks = [arm_look(place) for place in range(count)]
    return [Line2D([], [], color=c, marker=m, linestyle=line, linewidth=2.0, markersize=6) for c, m, line in looks]


def number_axis(axes: Axes, which: Literal["x", "y"], percent: bool) -> None:
    """Few round ticks; shares as percentages."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    if percent:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 6):g}"))


def _draw_line(axes: Axes, place: int, curve: Curve) -> None:
    color, marker, line = arm_look(place)
    where, mean, low, high = curve
    axes.fill_between(where, low, high, color=color, alpha=0.15, linewidth=0)
    axes.plot(where, mean, color=color, linestyle=line, linewidth=2.0, zorder=3, marker=marker, markersize=6,
              markevery=[len(mean) - 1], markeredgecolor="white", markeredgewidth=0.7)  # fmt: skip


def _finish(axes: Axes, drawn: bool, reason: str, percent: bool) -> None:
    if not drawn:
        empty(axes, reason)
        return
    axes.grid(color=FAINT, linewidth=0.8)
    axes.margins(x=0.03, y=0.08)
    axes.autoscale(axis="x")  # panels may share the axis: over the lines of all
    axes.set_xlim(left=0.0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    number_axis(axes, "y", percent)
