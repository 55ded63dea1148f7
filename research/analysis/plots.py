"""The pictures of an ablation, as PNG: final values, learning curves, accuracy against tokens spent."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from research.analysis.figures import CONTROL_COLOR, FAINT, INK, MARKERS, PALETTE, dress, save
from research.analysis.formatting import MetricFormat
from research.analysis.results import RunResult
from research.analysis.statistics import Comparison

LineStyle = Literal["-", "--", ":"]
LINES: tuple[LineStyle, ...] = ("-", "--", ":")
XAxis = Literal["step", "tokens_spent"]
Curve = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def write_plots(
    results: Sequence[RunResult], comparison: Comparison, style: MetricFormat, directory: Path
) -> dict[str, Path]:
    """Draws the three panels, each alone and side by side, and writes them.

    Args:
      results: all runs; failed ones are left out.
      comparison: their statistics; gives the order of the arms.
      style: how the metric is shown.
      directory: where to; must exist.

    Returns:
      Paths by name: "bars", "curves", "tokens", "summary".
    """

    def bars(axes: Axes) -> None:
        draw_bars(axes, comparison, style)

    def curves(axes: Axes) -> None:
        draw_curves(axes, results, comparison, style, x="step")

    def tokens(axes: Axes) -> None:
        draw_curves(axes, results, comparison, style, x="tokens_spent")

    rows = len(comparison.arms)
    figures = {
        "bars": _figure([bars], comparison, size=(7.0, 1.5 + 0.5 * rows), legend=False),
        "curves": _figure([curves], comparison, size=(7.0, 4.4), legend=True),
        "tokens": _figure([tokens], comparison, size=(7.0, 4.4), legend=True),
        "summary": _figure(
            [bars, curves, tokens], comparison, size=(15.0, max(4.6, 1.8 + 0.4 * rows)), legend=True
        ),
    }
    paths = {}
    for name, figure in figures.items():
        paths[name] = save(figure, directory / f"{name}.png")
    return paths


def draw_bars(axes: Axes, comparison: Comparison, style: MetricFormat) -> None:
    """A bar for each arm's mean, its 95% t-interval, a dot for each seed, a line at the control's mean."""
    dress(axes, f"Final {style.name}", "bar: mean · whisker: 95% t-interval · dots: seeds · dashed: control")
    ends = [0.0]
    for row, summary in enumerate(comparison.arms):
        color, marker, _ = _look(row)
        if summary.mean is None:
            axes.text(
                0.0, row, "  no finished run", va="center", ha="left", color=INK, fontsize=9, style="italic"
            )
            continue
        axes.barh(row, summary.mean, height=0.62, color=color, alpha=0.35, edgecolor=color, linewidth=1.2)
        low = high = summary.mean
        if summary.t_interval is not None:
            low, high = summary.t_interval.low, summary.t_interval.high
            if style.percent:  # a t-interval does not know that an accuracy ends at 0 and 1
                low, high = max(low, 0.0), min(high, 1.0)
            span = [[summary.mean - low], [high - summary.mean]]
            axes.errorbar(
                summary.mean, row, xerr=span, fmt="none", ecolor=INK, elinewidth=1.4, capsize=4, zorder=4
            )
        values = list(summary.values.values())
        offsets = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else [0.0]
        axes.plot(values, row + np.asarray(offsets), linestyle="none", marker=marker, markersize=5.5,
                  color=color, markeredgecolor="white", markeredgewidth=0.7, zorder=5)  # fmt: skip
        outermost = max(high, *values) if summary.mean >= 0 else min(low, *values)
        ends += [low, high, *values]
        axes.annotate(style.value(summary.mean), (outermost, row), (7 if summary.mean >= 0 else -7, 0),
                      textcoords="offset points", va="center", ha="left" if summary.mean >= 0 else "right",
                      color=INK, fontsize=10, fontweight="bold")  # fmt: skip
    control = comparison.arms[0].mean
    if control is not None:
        axes.axvline(control, color=INK, linestyle=(0, (4, 3)), linewidth=1.0, zorder=3)
    width = (max(ends) - min(ends)) or 1.0
    axes.set_xlim(min(ends) - (0.24 * width if min(ends) < 0 else 0.0), max(ends) + 0.18 * width)
    axes.set_ylim(len(comparison.arms) - 0.45, -0.55)
    labels = [f"{s.arm}\n(control)" if s.arm == comparison.control else s.arm for s in comparison.arms]
    axes.set_yticks(range(len(labels)), labels, fontsize=10)
    axes.tick_params(axis="y", length=0)
    _number_axis(axes, "x", style)
    axes.set_xlabel(style.label)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)


def draw_curves(
    axes: Axes, results: Sequence[RunResult], comparison: Comparison, style: MetricFormat, *, x: XAxis
) -> None:
    """Each arm's mean over seeds, with the seeds' range as a band, against steps or tokens spent."""
    name = {"step": "while training", "tokens_spent": "against tokens spent"}[x]
    dress(axes, f"{style.name} {name}", "line: mean over seeds · band: lowest to highest seed")
    drawn = False
    for row, summary in enumerate(comparison.arms):
        runs = [r for r in results if r.arm == summary.arm and r.seed in summary.values]
        curve = _mean_curve(runs, style.name, x)
        if curve is None:
            continue
        drawn = True
        color, marker, line = _look(row)
        where, mean, low, high = curve
        axes.fill_between(where, low, high, color=color, alpha=0.18, linewidth=0)
        axes.plot(where, mean, color=color, linestyle=line, linewidth=2.0, zorder=3,
                  marker=marker, markersize=6, markevery=[len(mean) - 1],
                  markeredgecolor="white", markeredgewidth=0.7)  # fmt: skip
    axes.set_xlabel({"step": "optimizer step", "tokens_spent": "tokens spent (sampled + trained)"}[x])
    axes.set_ylabel(style.label)
    axes.grid(color=FAINT, linewidth=0.8)
    if not drawn:
        axes.text(0.5, 0.5, "no evaluations while training", transform=axes.transAxes, ha="center", color=INK)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    axes.margins(x=0.03, y=0.08)
    axes.set_xlim(left=0.0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=x == "step"))
    if x == "tokens_spent":
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    _number_axis(axes, "y", style)


def _mean_curve(runs: Sequence[RunResult], metric: str, x: XAxis) -> Curve | None:
    """x, mean, lowest and highest over the runs at the steps that all of them evaluated; None without such.

    A step that only some seeds reached would shift the mean by who is in it.
    """
    tables = [{p["step"]: p for p in run.curve if metric in p and x in p} for run in runs]
    steps = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    if not steps:
        return None
    values = np.array([[table[step][metric] for step in steps] for table in tables], dtype=np.float64)
    where = np.array([[table[step][x] for step in steps] for table in tables], dtype=np.float64)
    return where.mean(axis=0), values.mean(axis=0), values.min(axis=0), values.max(axis=0)


def _figure(
    panels: Sequence[Callable[[Axes], None]],
    comparison: Comparison,
    *,
    size: tuple[float, float],
    legend: bool,
) -> Figure:
    """Panels side by side, `size` inches, with room for the legend below that."""
    names = [s.arm + (" (control)" if s.arm == comparison.control else "") for s in comparison.arms]
    widths = [0.75 + 0.085 * len(name) for name in names]  # inches, roughly: line, gap and 10 pt letters
    columns = len(names) if sum(widths) <= size[0] else max(1, int(size[0] / max(widths)))
    rows = math.ceil(len(names) / columns)
    height = size[1] + (0.22 * (rows - 1) if legend else 0.0)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(size[0], height), layout=layout, facecolor="white")
    for axes, draw in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        draw(axes)
    if legend:
        handles = []
        for row in range(len(names)):
            color, marker, line = _look(row)
            handles.append(
                Line2D([], [], color=color, marker=marker, linestyle=line, linewidth=2.0, markersize=6)
            )
        figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)
    return figure


def _look(row: int) -> tuple[str, str, LineStyle]:
    """Colour, marker and line style of the arm in this row; the control is row 0."""
    if row == 0:
        return CONTROL_COLOR, "o", "-"
    turn, place = divmod(row - 1, len(PALETTE))
    return PALETTE[place], MARKERS[(place + turn) % len(MARKERS)], LINES[turn % len(LINES)]


def _number_axis(axes: Axes, which: Literal["x", "y"], style: MetricFormat) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    if style.percent:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 6):g}"))
    else:
        axis.set_major_locator(MaxNLocator(6))
