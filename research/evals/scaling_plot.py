"""The picture of test-time compute: accuracy against samples a problem, and against tokens drawn for it."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullLocator

from research.analysis.figures import CONTROL_COLOR, FAINT, INK, MARKERS, PALETTE, dress, save
from research.evals.scaling import BEST, MAJORITY, PASS, RANDOM, WEIGHTED, Curve, Scaling

_LABELS = {
    PASS: "pass@N (any sample is right)",
    RANDOM: "random pick (control)",
    MAJORITY: "majority vote",
    BEST: "best of N",
    WEIGHTED: "weighted vote",
}


def write_scaling_plot(scaling: Scaling, path: Path, *, title: str) -> Path:
    """Draws both panels as a PNG, the same bytes for the same curves.

    Raises:
      WorkdirError: `path` cannot be written.
    """
    names = len(scaling.curves)
    rows = -(-names // 3)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(12.5, 5.2 + 0.22 * rows), layout=layout, facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    draw_against_samples(left, scaling, title=title)
    draw_against_tokens(right, scaling)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    return save(figure, path)


def draw_against_samples(axes: Axes, scaling: Scaling, *, title: str) -> None:
    """Accuracy over N on a log2 axis: bands over draws, and beside the largest N whiskers over problems."""
    _dress(axes, title, "band: 95% of draws of N samples · whisker: 95% bootstrap over problems")
    axes.set_xscale("log", base=2)
    for place, curve in enumerate(scaling.curves.values()):
        where = [point.n for point in curve.points]
        _draw(axes, scaling, curve, where)
        last = curve.points[-1]
        beside = last.n * 2 ** (0.25 + 0.16 * place)  # side by side, so that none hides another
        error = np.maximum(  # rounding may put an end of no length on the wrong side
            [[last.accuracy - last.problems.low], [last.problems.high - last.accuracy]], 0.0
        )
        axes.errorbar(beside, last.accuracy, yerr=error, fmt="none", ecolor=_color(scaling, curve), elinewidth=1.6,
                      capsize=2.5, linestyle="none")  # fmt: skip
    ns = [point.n for point in next(iter(scaling.curves.values())).points]
    axes.set_xticks(ns, [str(n) for n in ns])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("N, samples a problem")
    axes.set_ylabel("accuracy (%)")


def draw_against_tokens(axes: Axes, scaling: Scaling) -> None:
    """Accuracy over the tokens drawn for a problem, prompt once; what a scorer reads is not among them."""
    _dress(axes, "Against tokens drawn", "prompt once + N completions; a scorer's reading is not counted")
    axes.set_xscale("log", base=10)
    for curve in scaling.curves.values():
        _draw(axes, scaling, curve, [point.tokens for point in curve.points])
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_xlabel("tokens a problem, mean")


def _draw(axes: Axes, scaling: Scaling, curve: Curve, where: list[float] | list[int]) -> None:
    color = _color(scaling, curve)
    if curve.strategy != WEIGHTED:  # its band would lie on that of the same scorer's best-of-N
        spreads = [point.draws for point in curve.points]
        axes.fill_between(where, [s.low for s in spreads], [s.high for s in spreads], color=color, alpha=0.15,
                          linewidth=0)  # fmt: skip
    line = {RANDOM: ":", WEIGHTED: "--"}.get(curve.strategy, "-")
    label = _LABELS[curve.strategy] + (f" by {curve.scorer}" if curve.scorer else "")
    axes.plot(where, [point.accuracy for point in curve.points], color=color, linestyle=line, linewidth=2.0,
              marker=_marker(scaling, curve), markersize=5.5, markeredgecolor="white", markeredgewidth=0.7,
              label=label, zorder=3)  # fmt: skip


def _scorers(scaling: Scaling) -> list[str]:
    return list(dict.fromkeys(curve.scorer for curve in scaling.curves.values() if curve.scorer))


def _color(scaling: Scaling, curve: Curve) -> str:
    """One colour for each scorer, whatever is done with its scores."""
    if curve.scorer:
        return PALETTE[1:][_scorers(scaling).index(curve.scorer) % (len(PALETTE) - 1)]
    return {PASS: INK, RANDOM: CONTROL_COLOR, MAJORITY: PALETTE[0]}[curve.strategy]


def _marker(scaling: Scaling, curve: Curve) -> str:
    """Repeats the colour, for those who cannot tell colours apart and where colours run out."""
    return MARKERS[_scorers(scaling).index(curve.scorer) % len(MARKERS)] if curve.scorer else "o"


def _dress(axes: Axes, title: str, subtitle: str) -> None:
    """With accuracies in percent upwards."""
    dress(axes, title, subtitle)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 6):g}"))
