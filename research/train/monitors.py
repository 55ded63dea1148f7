"""What a person should look at while a policy learns from its own samples: alarms from each iteration's numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from research.core.errors import ConfigError

ALARMS: Mapping[str, str] = MappingProxyType(
    {
        "alarm/reward_hacking": "the reward rises while the gold reward falls (reward hacking)",
        "alarm/entropy_collapse": "the entropy is far below its start: samples of a prompt will be alike",
        "alarm/truncated": "many completions are cut at max_new_tokens, which silently ends learning",
        "alarm/zero_std": "most groups have equal rewards, which teach nothing",
        "alarm/gap": "sampler and trainer disagree on the log-probs of the same tokens",
        "alarm/kl": "the policy is far from its reference",
        "alarm/wrong_length": "wrong answers grow longer, relative to right ones",
    }
)
"""Each alarm, and what it says."""


@dataclass(frozen=True)
class MonitorBounds:
    """When an alarm is raised.

    Attributes:
      window: iterations with both rewards, over which a trend is judged; >= 4.
      margin: standard errors by which both slopes must differ from 0.
      smooth: iterations averaged for "at the start" and "now", for entropy and length; >= 1.
      entropy_fraction: entropy now over entropy at the start, below which it has collapsed; 0 is off.
      truncated: bound on the fraction of completions cut at the limit.
      zero_std: bound on the fraction of groups with equal rewards.
      gap: bound on the sampler-trainer gap, nats per token.
      kl: bound on the KL to the reference, in the unit it is given in; 0 is off.
      wrong_length: bound on the growth of the ratio of lengths, wrong to right, since the start; 0 is off.
    """

    window: int = 20
    margin: float = 3.0
    smooth: int = 5
    entropy_fraction: float = 0.1
    truncated: float = 0.25
    zero_std: float = 0.9
    gap: float = 0.1
    kl: float = 0.0
    wrong_length: float = 1.5

    def __post_init__(self) -> None:
        """Raises ConfigError naming the key, what it got and what was expected."""
        for key, least in (("window", 4), ("smooth", 1)):
            if (value := vars(self)[key]) < least:
                raise ConfigError(f"{key}: got {value}, expected at least {least}")
        for key in ("margin", "entropy_fraction", "truncated", "zero_std", "gap", "kl", "wrong_length"):
            if not 0.0 <= (value := vars(self)[key]) < math.inf:
                raise ConfigError(f"{key}: got {value}, expected a finite number >= 0")


class Reading(NamedTuple):
    """One iteration's numbers; None where it was not measured.

    Attributes:
      proxy: mean of the reward learned from.
      gold: mean of the reward that is really wanted, such as held-out accuracy or a stronger judge's.
      kl: to the reference, nats.
      entropy: of the policy, nats per token.
      truncated: fraction of completions cut at their limit.
      zero_std: fraction of groups with equal rewards.
      gap: mean |log-prob difference| between sampler and trainer, nats per token.
      length_right: mean tokens of right answers.
      length_wrong: mean tokens of wrong answers.
    """

    proxy: float | None = None
    gold: float | None = None
    kl: float | None = None
    entropy: float | None = None
    truncated: float | None = None
    zero_std: float | None = None
    gap: float | None = None
    length_right: float | None = None
    length_wrong: float | None = None


METRICS: Mapping[str, str] = MappingProxyType(
    {
        "proxy": "reward/mean",
        "gold": "reward/gold",
        "kl": "kl_ref",
        "entropy": "entropy",
        "truncated": "completions/truncated_fraction",
        "zero_std": "frac_reward_zero_std",
        "gap": "sampler_trainer_gap",
        "length_right": "completions/mean_length_right",
        "length_wrong": "completions/mean_length_wrong",
    }
)
"""The metric that each number of a reading is logged as."""


def reading_of(metrics: Mapping[str, Any]) -> Reading:
    """The numbers among an iteration's metrics, by the names in METRICS."""
    return Reading(**{key: float(metrics[name]) for key, name in METRICS.items() if name in metrics})


def slope_in_errors(values: Sequence[float]) -> float:
    """The least-squares slope of `values` over their index, in its own standard errors.

    `b / se(b)` with `b = sum_i (i - i_mean)(y_i - y_mean) / S`, `S = sum_i (i - i_mean)^2`,
    `se(b)^2 = sum_i residual_i^2 / ((n - 2) S)`. An exact line has an infinite one; equal values have 0.

    Args:
      values: at least 3.

    Raises:
      ValueError: fewer than 3 values, which leave no residual.
    """
    if len(values) < 3:
        raise ValueError(f"values: got {len(values)}, expected at least 3")
    y = np.asarray(values, np.float64)
    x = np.arange(len(y)) - (len(y) - 1) / 2
    centred = y - y.mean()
    slope = float(x @ centred / (x @ x))
    rounding = 1e-12 * max(float(np.abs(y).max()), 1e-300)
    if abs(slope) * len(y) <= rounding:
        return 0.0
    residual = float(np.sqrt(np.square(centred - slope * x).sum() / (len(y) - 2)))
    if residual <= rounding:
        return math.copysign(math.inf, slope)
    return slope / (residual / math.sqrt(x @ x))


def is_reward_hacking(proxy: Sequence[float], gold: Sequence[float], margin: float) -> bool:
    """Whether the proxy rises and the gold falls, each slope by more than `margin` standard errors.

    Both must be significant, so that noise around two flat lines, or a gold reward that merely stops rising,
    is no alarm.

    Source: the curves of Gao et al. 2023, Figure 1, in which gold turns down while proxy goes on up.
    """
    return slope_in_errors(proxy) > margin and slope_in_errors(gold) < -margin


class Monitors:
    """Alarm flags of a run, iteration by iteration; its state is small, bounded and plain JSON."""

    def __init__(self, bounds: MonitorBounds) -> None:
        """Nothing seen yet."""
        self.bounds = bounds
        self._proxy: list[float] = []
        self._gold: list[float] = []
        self._start: dict[str, list[float]] = {"entropy": [], "length": []}
        self._now: dict[str, list[float]] = {"entropy": [], "length": []}

    def update(self, reading: Reading) -> dict[str, float]:
        """The alarms that can be judged from this iteration, 1.0 where raised and 0.0 where not.

        A number that is None or not finite leaves its alarm out. A trend is 0.0 until its window is full.
        """
        bounds = self.bounds
        seen = {key: v for key, v in reading._asdict().items() if v is not None and math.isfinite(v)}
        alarms: dict[str, bool] = {}
        if {"proxy", "gold"} <= set(seen):
            self._proxy = [*self._proxy, float(seen["proxy"])][-bounds.window :]
            self._gold = [*self._gold, float(seen["gold"])][-bounds.window :]
            full = len(self._gold) == bounds.window
            alarms["reward_hacking"] = full and is_reward_hacking(self._proxy, self._gold, bounds.margin)
        if "entropy" in seen and bounds.entropy_fraction:
            change = self._change("entropy", seen["entropy"])
            alarms["entropy_collapse"] = change < bounds.entropy_fraction
        for key in ("truncated", "zero_std", "gap"):
            if key in seen:
                alarms[key] = seen[key] > vars(bounds)[key]
        if "kl" in seen and bounds.kl:
            alarms["kl"] = seen["kl"] > bounds.kl
        if {"length_right", "length_wrong"} <= set(seen) and bounds.wrong_length:
            change = self._change("length", seen["length_wrong"] / max(seen["length_right"], 1.0))
            alarms["wrong_length"] = change > bounds.wrong_length
        return {f"alarm/{name}": float(raised) for name, raised in alarms.items()}

    def get_state(self) -> dict[str, Any]:
        """Plain JSON, for the checkpoint."""
        return {
            "proxy": list(self._proxy),
            "gold": list(self._gold),
            "start": {name: list(values) for name, values in self._start.items()},
            "now": {name: list(values) for name, values in self._now.items()},
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `get_state`."""
        self._proxy, self._gold = list(state["proxy"]), list(state["gold"])
        self._start = {name: list(values) for name, values in state["start"].items()}
        self._now = {name: list(values) for name, values in state["now"].items()}

    def _change(self, name: str, value: float) -> float:
        """Mean of the last `smooth` values over that of the first; 1 until both are there, or of a start <= 0."""
        smooth = self.bounds.smooth
        if len(self._start[name]) < smooth:
            self._start[name].append(float(value))
            return 1.0
        self._now[name] = [*self._now[name], float(value)][-smooth:]
        start = float(np.mean(self._start[name]))
        if len(self._now[name]) < smooth or start <= 0:
            return 1.0
        return float(np.mean(self._now[name])) / start
