"""The row of the property tests' tables: one objective variant, its inputs and what it promises."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

B, T, V = 8, 6, 5
LENGTHS = [6, 1, 4, 0, 3, 6, 2, 5]  # uneven; one row truncated away, one of a single token
MASK = np.arange(T) < np.array(LENGTHS)[:, None]
TOKEN_AGGREGATIONS = ("token_mean", "sequence_mean", "constant")
EXAMPLE = ("example_mean",)


class Case(NamedTuple):
    """One row.

    Attributes:
      loss: the objective.
      differentiable: the arrays that must receive a gradient; all others must not.
      arrays: draws the arrays, each `[B, ...]`; with `masks`, those of shape `[B, T, ...]` are per token.
        Integer and boolean arrays are passed through as they are, but for the garbage in masked slots.
      scalars: traced hyperparameters; each must change the loss.
      aggregations: of the losses, `[B, T]`; `EXAMPLE` where the losses are `[B]`.
      options: static arguments.
      masks: names of the arguments that take `MASK`.
      positive: the scalars that may not be 0.
      weights: name of the argument that takes the row weights, if the objective needs them.
      coupled: rows depend on each other, so micro-batches may change the loss.
    """

    loss: Callable
    differentiable: set[str]
    arrays: Callable[[np.random.Generator], dict[str, np.ndarray]]
    scalars: dict[str, float]
    aggregations: tuple[str, ...] = TOKEN_AGGREGATIONS
    options: dict = {}
    masks: tuple[str, ...] = ()
    positive: frozenset[str] = frozenset()
    weights: str | None = None
    coupled: bool = False
