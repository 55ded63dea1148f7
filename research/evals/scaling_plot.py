"""The picture of test-time compute: accuracy against samples a problem, and against tokens drawn for it."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullLocator

from research.analysis.figures import CONTROL_COLOR, FAINT, INK, MARKERS, PALETTE, dress, panels, save
from research.evals.scaling import BEST, MAJORITY, PASS, RANDOM, WEIGHTED, Curve, Scaling

_LOOKS = {
    PASS: ("pass@N (any sample is right)", INK, "-"),
    RANDOM: ("random pick (control)", CONTROL_COLOR, ":"),
    MAJORITY: ("majority vote", PALETTE[0], "-"),
    BEST: ("best of N", "", "-"),
    WEIGHTED: ("weighted vote", "", "--"),
}
"""Label, colour ("" is the scorer's) and line of each strategy."""


def write_scaling_plot(scaling: Scaling, path: Path, *, title: str) -> Path:
    """Draws both panels as a PNG, the same bytes for the same curves."""
    figure, (left, right) = panels(2, columns=2, width=6.25, height=5.2 + 0.22 * -(-len(scaling.curves) // 3))
    right.sharey(left)
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
        color = _draw(axes, scaling, curve, [point.n for point in curve.points])
        last = curve.points[-1]
        beside = last.n * 2 ** (0.25 + 0.16 * place)  # side by side, so that none hides another
        # Rounding may put an end of no length on the wrong side.
        error = np.maximum([[last.accuracy - last.problems.low], [last.problems.high - last.accuracy]], 0.0)
        axes.errorbar(beside, last.accuracy, yerr=error, fmt="none", ecolor=color, elinewidth=1.6, capsize=2.5,
                      linestyle="none")  # fmt: skip
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


def _draw(axes: Axes, scaling: Scaling, curve: Curve, where: list[float] | list[int]) -> str:
    """A curve with its band; returns its colour: one for each scorer, which the marker repeats."""
    label, color, line = _LOOKS[curve.strategy]
    marker = "o"
    if curve.scorer:
        place = list(dict.fromkeys(c.scorer for c in scaling.curves.values() if c.scorer)).index(curve.scorer)
        color, marker = PALETTE[1:][place % (len(PALETTE) - 1)], MARKERS[place % len(MARKERS)]
        label += f" by {curve.scorer}"
    if curve.strategy != WEIGHTED:  # its band would lie on that of the same scorer's best-of-N
        spreads = [point.draws for point in curve.points]
        axes.fill_between(where, [s.low for s in spreads], [s.high for s in spreads], color=color, alpha=0.15,
                          linewidth=0)  # fmt: skip
    axes.plot(where, [point.accuracy for point in curve.points], color=color, linestyle=line, linewidth=2.0,
              marker=marker, markersize=5.5, markeredgecolor="white", markeredgewidth=0.7, label=label,
              zorder=3)  # fmt: skip
    return color


def _dress(axes: Axes, title: str, subtitle: str) -> None:
    """With accuracies in percent upwards."""
    dress(axes, title, subtitle)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 6):g}"))
