"""Our objectives on the inputs that TRL was given: one entry per stored variant.

Where ours differs from TRL on purpose, the entry's `difference` says so in a formula and its loss applies it.
Shapes: S = 2 sides of a pair, B rows, T slots, V vocabulary.
"""

from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np

from tests.objectives.golden import ours_online, ours_pairs
from tests.objectives.golden.store import load
from tests.objectives.golden.terms import Case, Entry

__all__ = ["Agreement", "agreement", "entries"]

RTOL = ATOL = 1e-5


class Agreement(NamedTuple):
    """How close ours is to TRL on one variant.

    Attributes:
      cases: how many were compared.
      loss, gradient: largest absolute differences; gradient is NaN where there is none.
      worst: largest difference as a multiple of what float32 is allowed, `1e-5 + 1e-5 |TRL's|`.
    """

    cases: int
    loss: float
    gradient: float
    worst: float


def entries() -> dict[str, Entry]:
    """Every variant we have, by its name in the file."""
    return {**ours_pairs.ENTRIES, **ours_online.ENTRIES}


@cache
def stored() -> dict[str, np.ndarray]:
    """TRL's numbers."""
    return load()[0]


def family(name: str) -> Case:
    """The inputs of one family, cases first."""
    return {key.split("/")[1]: x for key, x in stored().items() if key.startswith(f"{name}/")}


def agreement(variant: str) -> Agreement:
    """Runs ours on all cases of a variant."""
    entry = entries()[variant]
    inputs = family(entry.family)
    if entry.variable is None:
        got, expected = jax.jit(jax.vmap(entry.loss))(inputs), stored()[f"{variant}/{entry.output}"]
        if entry.compared is not None:
            is_compared = np.asarray(jax.vmap(entry.compared)(inputs))
            got, expected = np.where(is_compared, got, 0.0), np.where(is_compared, expected, 0.0)
        difference, worst = compare(got, expected)
        return Agreement(len(got), difference, float("nan"), worst)
    name = entry.variable
    variable = inputs.pop(name)

    def loss(variable: Any, inputs: Case) -> Any:
        return entry.loss({**inputs, name: variable})

    losses, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss)))(variable, inputs)
    loss_gap, loss_worst = compare(losses, stored()[f"{variant}/loss"])
    gradient_gap, gradient_worst = compare(gradients, stored()[f"{variant}/gradient"])
    return Agreement(len(losses), loss_gap, gradient_gap, max(loss_worst, gradient_worst))


def compare(got: Any, expected: np.ndarray) -> tuple[float, float]:
    """Largest absolute difference, and largest multiple of the tolerance."""
    np.testing.assert_array_equal(np.shape(got), np.shape(expected))
    gap = np.abs(np.asarray(got, np.float64) - expected)
    return float(gap.max()), float((gap / (ATOL + RTOL * np.abs(expected))).max())
