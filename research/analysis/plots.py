"""The pictures of an ablation: final values, differences, learning curves, training, grids."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from research.analysis.curves import arm_handles, draw_curves, draw_training, training_metrics
from research.analysis.figures import STYLE, blank_figure, legend_below, save, small_panels
from research.analysis.formatting import MetricFormat
from research.analysis.grids import draw_grid, grid_points
from research.analysis.intervals import draw_differences, draw_values, label_rows
from research.analysis.logs import Evidence
from research.analysis.rl_plots import KL, write_reward_against_kl
from research.analysis.statistics import Comparison

CROWD = 8
"""Above so many arms each has a panel of its own for its learning curve."""


@matplotlib.rc_context(STYLE)
def write_plots(
    evidence: Evidence, comparison: Comparison, style: MetricFormat, directory: Path, kinds: Sequence[str] = ("png",)
) -> dict[str, Path]:
    """Draws what there is to draw of, and writes it.

    Args:
      evidence: all runs; failed ones are left out of lines and means.
      comparison: their statistics; gives the order of the arms.
      style: how the metric is shown.
      directory: where to; must exist.
      kinds: "png", and "pdf" or "svg" beside it.

    Returns:
      The PNGs by name: "summary" and "curves" always; "training", "reward_against_kl" and "grid" where runs have
      the data.
    """
    results, logs = evidence.results, evidence.logs

    def by(x: str) -> Callable[[Axes], None]:
        return lambda axes: draw_curves(axes, results, comparison, style, x=x)  # type: ignore[arg-type]

    figures = {"summary": _summary(comparison, style, by("tokens_spent"))}
    if len(comparison.arms) <= CROWD:
        figures["curves"] = _lines([by("step"), by("tokens_spent")], comparison)
    else:
        figures["curves"] = _crowd(evidence, comparison, style)
    if metrics := training_metrics(logs):
        draws = [lambda axes, m=name: draw_training(axes, logs, comparison, m) for name in metrics]
        figures["training"] = _lines(draws, comparison)
    if points := grid_points(results):
        figures["grid"] = draw_grid(points, comparison, style)
    paths = {name: directory / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        for kind in kinds:
            save(figure, paths[name].with_suffix(f".{kind}"))
    by_arm = {arm.arm: [rows for (name, _), rows in logs.items() if name == arm.arm] for arm in comparison.arms}
    with_kl = {arm: runs for arm, runs in by_arm.items() if any(KL in row for rows in runs for row in rows)}
    if with_kl:
        path = directory / "reward_against_kl.png"
        paths["reward_against_kl"] = write_reward_against_kl(with_kl, path, kinds)
    return paths


def _summary(comparison: Comparison, style: MetricFormat, curve: Callable[[Axes], None]) -> Figure:
    """Values and differences side by side, and the learning curves where they can be told apart."""
    few = len(comparison.arms) <= CROWD
    figure = blank_figure(16.5 if few else 12.5, max(3.6, 1.7 + 0.42 * len(comparison.arms)))
    panels = figure.subplots(1, 3 if few else 2)
    draw_values(panels[0], comparison, style)
    label_rows(panels[0], comparison)
    draw_differences(panels[1], comparison, style)
    if few:
        curve(panels[2])
        _legend(figure, comparison)
    return figure


def _lines(draws: Sequence[Callable[[Axes], None]], comparison: Comparison) -> Figure:
    """Panels of lines, two in a row."""
    columns = min(2, len(draws))
    rows = -(-len(draws) // columns)
    figure = blank_figure(7.0 * columns, 4.2 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, draw in zip(panels, draws, strict=False):
        draw(axes)
    for axes in panels[len(draws) :]:
        axes.set_axis_off()
    _legend(figure, comparison)
    return figure


def _crowd(evidence: Evidence, comparison: Comparison, style: MetricFormat) -> Figure:
    """A panel for each arm, with the control's curve in grey."""
    figure, panels = small_panels(len(comparison.arms) - 1, height=2.5)
    for axes, summary in zip(panels, comparison.arms[1:], strict=True):
        draw_curves(axes, evidence.results, comparison, style, x="tokens_spent", only=summary.arm)
    figure.supxlabel("tokens spent (sampled + trained) · grey: control · band: lowest to highest seed", fontsize=10)
    figure.supylabel(style.label, fontsize=10)
    return figure


def _legend(figure: Figure, comparison: Comparison) -> None:
    names = [s.arm + (" (control)" if s.arm == comparison.control else "") for s in comparison.arms]
    legend_below(figure, arm_handles(len(names)), names)
