"""The pictures of runs: final values, differences, learning curves, training, grids, reward against KL."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from research.analysis.curves import arm_look, draw_curves, draw_training, running_mean, training_metrics
from research.analysis.figures import FAINT, PALETTE, STYLE, dress, legend_below, panel_title, panels, save
from research.analysis.formatting import MetricFormat
from research.analysis.grids import draw_grid, grid_points
from research.analysis.intervals import draw_differences, draw_values
from research.analysis.logs import Evidence, Rows
from research.analysis.statistics import Comparison, with_role

CROWD = 8
"""Above so many arms each has a panel of its own for its learning curve."""

KL = "kl/reference"
REWARDS = {"reward/mean": (PALETTE[0], "-", "o"), "reward/gold": (PALETTE[1], "--", "s")}


@matplotlib.rc_context(STYLE)
def write_plots(
    evidence: Evidence, comparison: Comparison, style: MetricFormat, directory: Path, kinds: Sequence[str] = ()
) -> dict[str, Path]:
    """Draws what there is to draw of, arms in the order of the comparison; writes PNGs, and other `kinds` beside them.

    Returns:
      The PNGs by name: "summary" and "curves" always; "training", "reward_against_kl" and "grid" where runs have
      the data.
    """
    logs, arms, few = evidence.logs, comparison.arms, len(comparison.arms) <= CROWD
    by_step, by_tokens = (
        partial(draw_curves, results=evidence.results, comparison=comparison, style=style, x=x)
        for x in ("step", "tokens_spent")
    )
    summary = [partial(draw, comparison=comparison, style=style) for draw in (draw_values, draw_differences)]
    height = max(3.6, 1.7 + 0.42 * len(arms))
    lines = partial(_figure, named=comparison, columns=2, width=7.0, height=4.2)
    if few:
        figures = {
            "summary": _figure([*summary, by_tokens], named=comparison, columns=3, width=5.5, height=height),
            "curves": lines([by_step, by_tokens]),
        }
    else:
        alone = [partial(by_tokens, only=arm.arm) for arm in arms[1:]]
        figures = {
            "summary": _figure(summary, columns=2, width=6.25, height=height),
            "curves": _figure(alone, columns=4, width=3.75, height=2.5, least=6.0, share=True),
        }
        about = "tokens spent (sampled + trained) · grey: control · band: lowest to highest seed"
        figures["curves"].supxlabel(about, fontsize=10)
        figures["curves"].supylabel(style.label, fontsize=10)
    if metrics := training_metrics(logs):
        figures["training"] = lines(
            [partial(draw_training, logs=logs, comparison=comparison, metric=m) for m in metrics]
        )
    if points := grid_points(evidence.results):
        figures["grid"] = draw_grid(points, comparison, style)
    paths = {name: save(figure, directory / f"{name}.png", kinds) for name, figure in figures.items()}
    by_arm = {arm.arm: [rows for (name, _), rows in logs.items() if name == arm.arm] for arm in arms}
    with_kl = {arm: runs for arm, runs in by_arm.items() if any(KL in row for rows in runs for row in rows)}
    if with_kl:
        paths["reward_against_kl"] = write_reward_against_kl(with_kl, directory / "reward_against_kl.png", kinds)
    return paths


def _figure(draws: Sequence[Callable[[Axes], None]], *, named: Comparison | None = None, **size: Any) -> Figure:
    """A panel for each, in `panels` of this size, with a legend of the arms where they are to be named."""
    figure, places = panels(len(draws), **size)
    for axes, draw in zip(places, draws, strict=True):
        draw(axes)
    if named is not None:
        looks = [arm_look(place) for place in range(len(named.arms))]
        lines = [Line2D([], [], color=c, marker=m, linestyle=line, linewidth=2.0, markersize=6) for c, m, line in looks]
        legend_below(figure, lines, [with_role(arm.arm, named.control) for arm in named.arms])
    return figure


def reward_curve(runs: Sequence[Rows], reward: str) -> Float[np.ndarray, "N 2"]:
    """KL (nats a completion) and reward at the steps of the runs at which both were logged, in order of KL.

    What is not finite is left out, and an estimate of the KL below 0 is 0.
    """
    found: list[tuple[float, float]] = []
    for rows in runs:
        rewards, kls = ({row["step"]: row[name] for row in rows if name in row} for name in (reward, KL))
        found += [(max(kls[step], 0.0), value) for step, value in rewards.items() if step in kls]
    points = np.array(found, np.float64).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    return points[np.argsort(points[:, 0], kind="stable")]


@matplotlib.rc_context(STYLE)
def write_reward_against_kl(runs: Mapping[str, Sequence[Rows]], path: Path, kinds: Sequence[str] = ()) -> Path:
    """Draws proxy and gold reward over the square root of the KL (Gao et al. 2023, Figure 1), a panel for each arm.

    Points are steps, lines their running means; the same bytes for the same rows, of one or more runs of each arm.
    `path` is the PNG's, `kinds` ("pdf", "svg") are written beside it; WorkdirError if they cannot be.
    """
    figure, places = panels(len(runs), columns=4, width=3.75, height=3.4, least=6.0, share=True)
    for axes, (name, its) in zip(places, runs.items(), strict=True):
        dress(axes, panel_title(name), "")
        for metric, (color, line, marker) in REWARDS.items():
            points = reward_curve(its, metric)
            root, reward = np.sqrt(points[:, 0]), points[:, 1]
            axes.plot(root, reward, marker, markersize=3.5, color=color, alpha=0.3, markeredgewidth=0)
            axes.plot(running_mean(root), running_mean(reward), linestyle=line, linewidth=2.0, color=color)
        axes.grid(color=FAINT, linewidth=0.8)
    legend = "solid: proxy, learned from · dashed: gold, really wanted"
    figure.supxlabel(f"√KL to the reference (√nats a completion)\n{legend}", fontsize=10)
    figure.supylabel("mean reward", fontsize=10)
    return save(figure, path, kinds)
