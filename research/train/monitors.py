"""What a person should look at while a policy learns from its own samples: alarms from each iteration's numbers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import linregress

ALARMS = {
    "alarm/reward_hacking": "the reward rises while the gold reward falls (reward hacking)",
    "alarm/entropy_collapse": "the entropy is far below its start: samples of a prompt will be alike",
    "alarm/truncated": "many completions are cut at max_new_tokens, which silently ends learning",
    "alarm/zero_std": "most groups have equal rewards, which teach nothing",
    "alarm/gap": "sampler and trainer disagree on the log-probs of the same tokens",
    "alarm/wrong_length": "wrong answers grow longer, relative to right ones",
}
"""Each alarm, and what it says."""
BOUNDS = {
    "truncated": ("completions/truncated_fraction", 0.25),
    "zero_std": ("frac_reward_zero_std", 0.9),
    "gap": ("sampler_trainer_gap", 0.1),
}
"""Alarms that are raised where a metric is above a bound."""
WINDOW = 20
"""Iterations with both rewards, over which their trends are judged."""
MARGIN = 3.0
"""Standard errors by which both slopes must differ from 0."""
SMOOTH = 5
"""Iterations averaged for "at the start" and "now"."""
LEAST_ENTROPY = 0.1
"""Entropy now over entropy at the start, below which it has collapsed."""
MOST_GROWTH = 1.5
"""Bound on the growth of the ratio of lengths, wrong answers to right ones, since the start."""


def slope_in_errors(values: Sequence[float]) -> float:
    """The least-squares slope of `values` over their index, in its own standard errors; of equal values 0."""
    if np.ptp(values) == 0:
        return 0.0
    line = linregress(np.arange(len(values)), values)
    return float(line.slope / line.stderr) if line.stderr else math.copysign(math.inf, line.slope)


def is_reward_hacking(proxy: Sequence[float], gold: Sequence[float]) -> bool:
    """Whether the proxy rises and the gold falls, each slope by more than MARGIN.

    Both must be significant, so that noise around two flat lines, or a gold reward that merely stops rising, is no
    alarm. Source: the curves of Gao et al. 2023, Figure 1, in which gold turns down while proxy goes on up.
    """
    return slope_in_errors(proxy) > MARGIN and slope_in_errors(gold) < -MARGIN


class Monitors:
    """Alarm flags of a run, iteration by iteration; its state is small, bounded and plain JSON."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self._seen: dict[str, list[float]] = {}

    def update(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """The alarms that can be judged from this iteration's metrics, 1.0 where raised and 0.0 where not.

        A metric that is missing or not finite leaves its alarm out. A trend is 0.0 until its window is full.
        """
        found = {name: float(value) for name, value in metrics.items() if np.isfinite(value)}
        alarms = {name: found[metric] > bound for name, (metric, bound) in BOUNDS.items() if metric in found}
        if {"reward/mean", "reward/gold"} <= found.keys():
            proxy, gold = (self._last(name, found[f"reward/{name}"], WINDOW) for name in ("mean", "gold"))
            alarms["reward_hacking"] = len(gold) == WINDOW and is_reward_hacking(proxy, gold)
        if "entropy" in found:
            alarms["entropy_collapse"] = self._change("entropy", found["entropy"]) < LEAST_ENTROPY
        right, wrong = (found.get(f"completions/mean_length_{which}") for which in ("right", "wrong"))
        if right is not None and wrong is not None:
            alarms["wrong_length"] = self._change("length", wrong / max(right, 1.0)) > MOST_GROWTH
        return {f"alarm/{name}": float(raised) for name, raised in alarms.items()}

    def get_state(self) -> dict[str, Any]:
        """Plain JSON, for the checkpoint."""
        return dict(self._seen)

    def set_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `get_state`."""
        self._seen = dict(state)

    def _last(self, name: str, value: float, most: int) -> list[float]:
        self._seen[name] = [*self._seen.get(name, []), value][-most:]
        return self._seen[name]

    def _change(self, name: str, value: float) -> float:
        """Mean of the last SMOOTH values over that of the first; 1 until both are there, or of a start <= 0."""
        start = self._seen.get(f"{name}/start", [])
        if len(start) < SMOOTH:
            self._last(f"{name}/start", value, SMOOTH)
            return 1.0
        now = self._last(f"{name}/now", value, SMOOTH)
        if len(now) < SMOOTH or np.mean(start) <= 0:
            return 1.0
        return float(np.mean(now) / np.mean(start))
