"""The types every objective shares. Shapes: B sequences, T tokens. All losses are float32, in nats."""

from typing import Any, NamedTuple, get_args

import jax
from jaxtyping import Array, Float

Scalar = float | Float[Array, ""]
"""A hyperparameter: a Python float or a traced scalar, so that a sweep over it compiles once."""


class Subset(NamedTuple):
    """A metric of some rows only (the desirable ones, prompts with a pair), so that its mean counts only those."""

    values: Array  # float32 [B]
    where: Array  # float32 [B], 1 on the rows that count, else 0


class ObjectiveOutput(NamedTuple):
    """What an objective returns; the caller reduces metrics over micro-batches with the masks of the losses.

    Attributes:
      losses: unreduced, float32, `[B]` (one per sequence or pair) or `[B, T]` (one per token).
      metrics: unreduced, float32, `[B]`, `[B, T]` or a `Subset` of the rows, without gradient.
    """

    losses: Array
    metrics: dict[str, Any]


class WeightedSum(NamedTuple):
    """A sum and the number of things summed; micro-batches and devices add both and divide once."""

    total: Array  # float32 scalar
    count: Array  # type: ignore[assignment]  # hides tuple.count; float32 scalar, independent of the parameters

    def __add__(self, other: "WeightedSum") -> "WeightedSum":  # type: ignore[override]
        return WeightedSum(self.total + other.total, self.count + other.count)

    def mean(self) -> Array:
        """`total / count`, and 0 where nothing was counted."""
        return self.total / jax.numpy.maximum(self.count, 1e-8)


def require_choice(name: str, value: Any, literal: Any) -> None:
    """Raises ValueError on a value that the `Literal` type does not list."""
    if value not in get_args(literal):
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(str, get_args(literal)))}")
