"""The picture of reward hacking: the reward learned from and the one really wanted, against KL."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float

from research.analysis.curves import running_mean
from research.analysis.figures import FAINT, PALETTE, STYLE, drawable, dress, save, small_panels
from research.analysis.logs import Rows

KL = "kl/reference"
REWARDS = {"reward/mean": (PALETTE[0], "-", "o"), "reward/gold": (PALETTE[1], "--", "s")}


def reward_curve(runs: Sequence[Rows], reward: str) -> Float[np.ndarray, "N 2"]:
    """KL (nats a completion) and reward at the steps at which both were logged, in order of KL.

    What is not finite is left out, and an estimate of the KL below 0 is 0.

    Args:
      runs: records of runs, such as the seeds of an arm, whose points are pooled.
      reward: the reward's metric.
    """
    found: list[tuple[float, float]] = []
    for rows in runs:
        rewards, kls = ({row["step"]: row[name] for row in rows if name in row} for name in (reward, KL))
        found += [(max(kls[step], 0.0), value) for step, value in rewards.items() if step in kls]
    points = np.array(found, np.float64).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    return points[np.argsort(points[:, 0], kind="stable")]


@matplotlib.rc_context(STYLE)
def write_reward_against_kl(runs: Mapping[str, Sequence[Rows]], path: Path, kinds: Sequence[str] = ("png",)) -> Path:
    """Draws proxy and gold reward over the square root of the KL (Gao et al. 2023, Figure 1), a panel for each arm.

    Points are steps, lines their running means; the same bytes for the same rows.

    Args:
      runs: records of one or more runs by the arm's name.
      path: of the PNG.
      kinds: "png", and "pdf" or "svg" beside it.

    Raises:
      WorkdirError: `path` cannot be written.
    """
    figure, panels = small_panels(len(runs), height=3.4)
    for axes, (name, its) in zip(panels, runs.items(), strict=True):
        dress(axes, drawable([name], 26)[0], "")
        for metric, (color, line, marker) in REWARDS.items():
            points = reward_curve(its, metric)
            root, reward = np.sqrt(points[:, 0]), points[:, 1]
            axes.plot(root, reward, linestyle="none", marker=marker, markersize=3.5, color=color, alpha=0.3,
                      markeredgewidth=0)  # fmt: skip
            axes.plot(running_mean(root), running_mean(reward), linestyle=line, linewidth=2.0, color=color)
        axes.grid(color=FAINT, linewidth=0.8)
    legend = "solid: proxy, learned from · dashed: gold, really wanted"
    figure.supxlabel(f"√KL to the reference (√nats a completion)\n{legend}", fontsize=10)
    figure.supylabel("mean reward", fontsize=10)
    for kind in kinds:
        save(figure, path.with_suffix(f".{kind}"))
    return path
