"""Optimizers and schedules that a config can name; a user's own are `Rule`s or `Schedule`s in a file of theirs."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

Numbers = Mapping[str, Float[Any, ""]]
"""Traced options by name: a sweep over them compiles once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """An optimizer.

    Attributes:
      options: its keys, all traced numbers.
      make: options -> the direction of an update, before the learning rate, weight decay included. Its state's shape
        must not depend on the numbers.
    """

    options: Mapping[str, Any]
    make: Callable[[Numbers], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A learning rate's course after the warm-up.

    Attributes:
      options: its keys, all traced numbers.
      make: options, share of the decay that is done (0 at the first update after warm-up, 1 after the last one) ->
        share of the peak rate.
    """

    options: Mapping[str, Any]
    make: Callable[[Numbers, Float[Array, ""]], Float[Array, ""]]


def decayed(coef: Float[Any, ""]) -> optax.GradientTransformation:
    """Decoupled weight decay (Loshchilov and Hutter 2019), on matrices only: norms' scales are not decayed."""
    return optax.add_decayed_weights(coef, mask=_is_matrix)


def _is_matrix(params: Any) -> Any:
    """True on every parameter but the norms' scales (which layer stacking turns into matrices too)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "key", "") != "scale", params)


def cosine(o: Numbers, done: Float[Array, ""]) -> Float[Array, ""]:
    """`end + (1 - end) (1 + cos(pi done)) / 2` (Loshchilov and Hutter 2017)."""
    return o["end_fraction"] + (1.0 - o["end_fraction"]) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))


def linear(o: Numbers, done: Float[Array, ""]) -> Float[Array, ""]:
    """`1 - (1 - end) done`."""
    return 1.0 - (1.0 - o["end_fraction"]) * done


def adamw(o: Numbers) -> optax.GradientTransformation:
    """AdamW; epsilon is added to the root of the second moment, outside the root (Kingma and Ba 2015, algorithm 1)."""
    return optax.chain(optax.scale_by_adam(b1=o["b1"], b2=o["b2"], eps=o["eps"]), decayed(o["weight_decay"]))


def sgd(o: Numbers) -> optax.GradientTransformation:
    """Stochastic gradient descent with momentum."""
    return optax.chain(optax.trace(decay=o["momentum"]), decayed(o["weight_decay"]))
