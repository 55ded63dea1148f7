"""Scores in units of their own spread: running statistics, or fixed ones of the reference's completions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from research.core.errors import DataError

Normalize = Literal["none", "running", "reference"]


@dataclass(frozen=True)
class RunningNorm:
    """Mean and spread of all scores seen, as Welford keeps them; immutable.

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
        """With a batch of scores added: `m2 = m2_a + m2_b + (mean_b - mean_a)^2 n_a n_b / (n_a + n_b)`.

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


def fit_norm(scores: np.ndarray) -> RunningNorm:
    """Statistics of the reference's completions, for normalize="reference".

    Raises:
      DataError: fewer than two scores, or scores that do not differ: there is nothing to divide by.
    """
    check_finite(scores)
    if len(scores) < 2 or np.ptp(scores) == 0:
        raise DataError(
            f"reference scores: got {len(scores)} with {len(np.unique(scores))} distinct, expected at least two "
            "that differ because the reward is divided by their standard deviation"
        )
    return RunningNorm().updated(scores)


def normalized(
    scores: np.ndarray, normalize: Normalize, state: RunningNorm
) -> tuple[np.ndarray, RunningNorm]:
    """`(score - mean) / std`, and the statistics to go on with.

    Args:
      scores: `[B]` float64, finite.
      normalize: "running" adds the batch to the statistics first, so that no score is further than `sqrt(n)`
        from 0 after n; "reference" leaves them as they are; "none" does nothing.
      state: statistics so far.

    Raises:
      DataError: "reference" without statistics.
    """
    if normalize == "none":
        return scores, state
    if normalize == "reference":
        if state.count < 2:
            raise DataError(
                f"normalize: got 'reference' with statistics of {state.count} scores, expected those of the "
                "reference's completions"
            )
    else:
        state = state.updated(scores)
    return (scores - state.mean) / state.std, state


def check_finite(rewards: np.ndarray) -> None:
    """Raises ValueError naming the first row that is NaN or infinite."""
    bad = np.flatnonzero(~np.isfinite(rewards))
    if bad.size:
        raise ValueError(f"rewards: got {rewards[bad[0]]} at row {bad[0]}, expected finite numbers")
