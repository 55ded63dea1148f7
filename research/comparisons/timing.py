"""What was timed, and how: everything takes its turn in every round, so that noise meets all alike."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def turns(names: Sequence[str], number: int) -> list[str]:
    """Who goes after whom in a round: the first changes from round to round."""
    shift = number % max(len(names), 1)
    return [*names[shift:], *names[:shift]]


@dataclasses.dataclass(frozen=True)
class Series:
    """The repetitions of one contender.

    Attributes:
      seconds, tokens: of each repetition; useful tokens.
      about: what else is known of it; plain JSON.
    """

    seconds: tuple[float, ...]
    tokens: tuple[float, ...]
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def rates(self) -> np.ndarray:
        """Tokens/s of each repetition."""
        return np.divide(self.tokens, self.seconds)

    @property
    def rate(self) -> float:
        """Median tokens/s."""
        return float(np.median(self.rates))

    def over(self, other: "Series") -> tuple[float, float]:
        """Its rate over another's: the ratio of the medians, and the median of the ratios round by round."""
        return self.rate / other.rate, float(np.median(self.rates / other.rates))
