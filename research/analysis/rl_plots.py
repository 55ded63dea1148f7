"""The picture of reward hacking: the reward learned from and the one really wanted, against KL."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from research.analysis.figures import FAINT, INK, PALETTE, save
from research.core.errors import DataError

KLAxis = Literal["kl", "sqrt_kl"]
Rows = Sequence[Mapping[str, Any]]
"""Records of a metrics.jsonl; several may share a step."""

_LABELS = {
    "kl": "KL to the reference (nats a completion)",
    "sqrt_kl": "√KL to the reference (√nats a completion)",
}


class RewardCurve(NamedTuple):
    """Points of one reward, `[n]` each, in order of KL."""

    kl: np.ndarray
    reward: np.ndarray


def reward_curve(rows: Rows, *, reward: str, kl: str = "kl/reference") -> RewardCurve:
    """The steps at which both a reward and the KL were logged, in whichever records.

    Args:
      rows: records of a run.
      reward: the reward's metric.
      kl: the KL's metric, nats.

    Returns:
      The points; none where the two never met. What is not finite is left out, and an estimate below 0 is 0.
    """
    found: dict[str, dict[int, float]] = {reward: {}, kl: {}}
    for row in rows:
        for name, values in found.items():
            if name in row:
                values[int(row["step"])] = float(row[name])  # "NaN" and "Infinity" too
    steps = sorted(set(found[reward]) & set(found[kl]))
    points = np.array([(max(found[kl][step], 0.0), found[reward][step]) for step in steps]).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    points = points[np.argsort(points[:, 0], kind="stable")]
    return RewardCurve(points[:, 0], points[:, 1])


def draw_reward_against_kl(
    axes: Axes,
    runs: Mapping[str, Rows],
    *,
    proxy: str = "reward/mean",
    gold: str = "reward/gold",
    kl: str = "kl/reference",
    x: KLAxis = "sqrt_kl",
) -> None:
    """A colour for each run; proxy solid with dots, gold dashed with squares; lines are running means.

    Source: Gao et al. 2023, Figure 1, over the square root of the KL.

    Args:
      axes: where to.
      runs: records by label.
      proxy: metric of the reward learned from.
      gold: metric of the reward really wanted.
      kl: metric of the KL to the reference, nats.
      x: the axis.

    Raises:
      ValueError: unknown axis.
    """
    if x not in _LABELS:
        raise ValueError(f"x: got {x!r}, expected one of {', '.join(_LABELS)}")
    drawn = False
    for place, (label, rows) in enumerate(runs.items()):
        color = PALETTE[place % len(PALETTE)]
        for metric, role, line, marker in ((proxy, "proxy", "-", "o"), (gold, "gold", "--", "s")):
            curve = reward_curve(rows, reward=metric, kl=kl)
            if not curve.kl.size:
                continue
            drawn = True
            where = np.sqrt(curve.kl) if x == "sqrt_kl" else curve.kl
            axes.plot(where, curve.reward, linestyle="none", marker=marker, markersize=3.5, color=color,
                      alpha=0.3, markeredgewidth=0)  # fmt: skip
            axes.plot(_running_mean(where), _running_mean(curve.reward), linestyle=line, linewidth=2.0,
                      color=color, label=f"{label}: {role}")  # fmt: skip
    axes.set_title("Proxy and gold reward against KL", loc="left", fontsize=12, fontweight="bold", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=10, colors=INK)
    axes.set_xlabel(_LABELS[x])
    axes.set_ylabel("mean reward")
    axes.grid(color=FAINT, linewidth=0.8)
    if not drawn:
        axes.text(0.5, 0.5, "no step with reward and KL", transform=axes.transAxes, ha="center", color=INK)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    axes.set_xlim(left=0.0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(6))


def write_reward_against_kl(
    runs: Mapping[str, Rows],
    path: Path,
    *,
    proxy: str = "reward/mean",
    gold: str = "reward/gold",
    kl: str = "kl/reference",
    x: KLAxis = "sqrt_kl",
) -> Path:
    """Draws it as a PNG, the same bytes for the same rows; see `draw_reward_against_kl`.

    Raises:
      DataError: there are no runs.
      WorkdirError: `path` cannot be written.
    """
    if not runs:
        raise DataError(f"{path}: got no runs, expected at least one to draw.")
    figure = Figure(
        figsize=(7.0, 4.6), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08), facecolor="white"
    )
    axes = figure.subplots()
    draw_reward_against_kl(axes, runs, proxy=proxy, gold=gold, kl=kl, x=x)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = 2 if max(map(len, labels)) < 40 else 1
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)
    return save(figure, path)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Means over a tenth of the points (at least 1), which neither lag nor bend at the ends."""
    width = max(1, len(values) // 10)
    return np.convolve(values, np.full(width, 1.0 / width), mode="valid")
