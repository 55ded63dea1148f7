"""Panels with a line for each arm: evaluations while training, and what was logged at every step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from research.analysis.figures import CONTROL_COLOR, FAINT, INK, MARKERS, PALETTE, dress, panel_title
from research.analysis.formatting import MetricFormat
from research.analysis.glossary import describe
from research.analysis.logs import Rows
from research.analysis.results import RunResult
from research.analysis.statistics import ArmSummary, Comparison

LineStyle = Literal["-", "--", ":"]
LINES: tuple[LineStyle, ...] = ("-", "--", ":")
XAxis = Literal["step", "tokens_spent"]
Points = Mapping[float, tuple[float, float]]
"""Step -> (x, value) of one run."""

TRAINING = (("reward/mean",), ("kl/reference", "kl_ref"), ("entropy", "sampler_entropy_estimate"),
            ("completions/mean_length",))  # fmt: skip
"""The panels of training: of each, the first metric that any run has logged."""


def draw_curves(
    axes: Axes, results: Sequence[RunResult], comparison: Comparison, style: MetricFormat, *, x: XAxis, only: str = ""
) -> None:
    """Each arm's mean over the seeds that have finished, with their range as a band, against steps or tokens spent.

    `only` draws this arm and the control, in a small panel with the arm's name.
    """
    if not only:
        where = "while training" if x == "step" else "against tokens spent"
        dress(axes, f"{style.name} {where}", "line: mean over seeds · band: lowest to highest seed")
        axes.set_xlabel("optimizer step" if x == "step" else "tokens spent (sampled + trained)")
        axes.set_ylabel(style.label)
    else:
        dress(axes, panel_title(only), "")

    def points(summary: ArmSummary) -> list[Points]:
        if only and summary.arm not in (only, comparison.control):
            return []
        runs = [r for r in results if r.arm == summary.arm and r.seed in summary.values]
        return [{p["step"]: (p[x], p[style.name]) for p in r.curve if style.name in p and x in p} for r in runs]

    drawn = _draw_lines(axes, comparison, points, "no evaluations while training", style.percent)
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
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(found.unit if found else metric)

    def smooth(rows: Rows) -> Points:
        values = {row["step"]: row[metric] for row in rows if metric in row and np.isfinite(row[metric])}
        means = running_mean(np.array(list(values.values()), np.float64))
        early = (len(values) - len(means)) // 2  # centred: as many steps are lost at either end
        return {step: (step, mean) for step, mean in zip(list(values)[early:], means, strict=False)}

    def points(summary: ArmSummary) -> list[Points]:
        return [smooth(logs[summary.arm, seed]) for seed in summary.values if (summary.arm, seed) in logs]

    _draw_lines(axes, comparison, points, "not logged", percent=False)


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


def number_axis(axes: Axes, which: Literal["x", "y"], percent: bool) -> None:
    """Few round ticks; shares as percentages."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    if percent:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 6):g}"))


def _draw_lines(
    axes: Axes, comparison: Comparison, points: Callable[[ArmSummary], list[Points]], reason: str, percent: bool
) -> bool:
    """Each arm's mean and range at the steps that all of its runs have; says the `reason` where there is nothing.

    A step that only some seeds reached would shift the mean by who is in it.
    """
    drawn = False
    for place, summary in enumerate(comparison.arms):
        runs = points(summary)
        steps = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
        if not steps:
            continue
        drawn = True
        found = np.array([[run[step] for step in steps] for run in runs], dtype=np.float64)
        where, values = found[..., 0].mean(axis=0), found[..., 1]
        color, marker, line = arm_look(place)
        axes.fill_between(where, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, linewidth=0)
        axes.plot(where, values.mean(axis=0), color=color, linestyle=line, linewidth=2.0, zorder=3, marker=marker,
                  markersize=6, markevery=[len(steps) - 1], markeredgecolor="white", markeredgewidth=0.7)  # fmt: skip
    if not drawn:
        axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", color=INK)
        axes.set(xticks=[], yticks=[])
        return False
    axes.grid(color=FAINT, linewidth=0.8)
    axes.margins(x=0.03, y=0.08)
    axes.autoscale(axis="x")  # panels may share the axis: over the lines of all
    axes.set_xlim(left=0.0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    number_axis(axes, "y", percent)
    return True
