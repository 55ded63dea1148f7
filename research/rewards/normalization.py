"""Scores to mean 0 and standard deviation 1: by running statistics, or by those of the first batch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class RunningNorm:
    """Mean and variance of all scores seen, by Welford's algorithm; immutable.

    Attributes:
      count: scores seen.
      mean: their mean.
      m2: sum of squared distances to the mean.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    @property
    def std(self) -> float:
        """Population standard deviation; 1 where all scores are equal up to rounding, or there are none."""
        std = math.sqrt(self.m2 / self.count) if self.count else 0.0
        return std if std > 1e-8 * max(1.0, abs(self.mean)) else 1.0

    def updated(self, values: np.ndarray) -> "RunningNorm":
        """The statistics with a batch added: `m2 = m2_a + m2_b + (mean_b - mean_a)^2 n_a n_b / (n_a + n_b)`.

        Source: Chan, Golub and LeVeque 1979, the batch form of Welford 1962.
        """
        values = np.asarray(values, np.float64)
        if not values.size:
            return self
        mean, count = float(values.mean()), self.count + values.size
        apart = mean - self.mean
        m2 = self.m2 + float(np.square(values - mean).sum()) + apart**2 * self.count * values.size / count
        return RunningNorm(count, self.mean + apart * values.size / count, m2)

    def record(self) -> dict[str, Any]:
        """Plain JSON, for the checkpoint."""
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    @classmethod
    def restored(cls, record: Mapping[str, Any]) -> "RunningNorm":
        """The inverse of `record`."""
        return cls(int(record["count"]), float(record["mean"]), float(record["m2"]))


def normalized(scores: np.ndarray, normalize: str, state: RunningNorm) -> tuple[np.ndarray, RunningNorm]:
    """`(score - mean) / std`, and the statistics afterwards.

    Args:
      scores: `[B]` float64, finite.
      normalize: "running" adds the batch to the statistics first, so that no score is further than `sqrt(n)` from 0
        after n. "reference" takes those of the first batch whose scores differ: the policy is still its own
        reference. "none" does nothing.
      state: statistics so far.
    """
    if normalize == "none":
        return scores, state
    if normalize == "running":
        state = state.updated(scores)
    elif not state.count:
        fitted = RunningNorm().updated(scores)
        return (scores - fitted.mean) / fitted.std, fitted if np.ptp(scores) > 0 else state
    return (scores - state.mean) / state.std, state


def check_finite(rewards: np.ndarray) -> None:
    """Raises ValueError naming the first row that is NaN or infinite."""
    bad = np.flatnonzero(~np.isfinite(rewards))
    if bad.size:
        raise ValueError(f"rewards: got {rewards[bad[0]]} at row {bad[0]}, expected finite numbers")
