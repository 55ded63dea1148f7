"""What the entries of `ours_pairs.py` and `ours_online.py` share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from objectives.reduce import example_mean, sequence_sum

Case = dict[str, Any]


class Entry(NamedTuple):
    """One variant of ours.

    Attributes:
      objective: the function, as the README names it.
      options: what makes it this variant.
      family: its inputs in the file.
      variable: the input that the loss is differentiated for; None where the output is a value.
      loss: from one case to the reduced loss (or to the value).
      difference: how ours differs from TRL on purpose, as a formula that `loss` has applied; else empty.
      output: name of the stored value where there is no gradient.
      compared: where the value is compared; None is everywhere.
    """

    objective: str
    options: str
    family: str
    variable: str | None
    loss: Callable[[Case], Array]
    difference: str = ""
    output: str = "loss"
    compared: Callable[[Case], Array] | None = None


def mean(losses: Array) -> Array:
    """Plain mean over rows."""
    return example_mean(losses).mean()


def both_sums(token_logps: Array, mask: Array) -> Array:
    """`[S, B]` sequence log-probs of `[S, B, T]`."""
    return jax.vmap(sequence_sum)(token_logps, mask)


def lengths(mask: Array) -> Array:
    """Unmasked tokens along the last axis, float32."""
    return mask.sum(axis=-1).astype(jnp.float32)


def target_logps(case: Case) -> Array:
    """`[S, B, T]` log-probs of the next tokens from logits `[S, B, T + 1, V]`."""
    logps = jax.nn.log_softmax(case["logits"][:, :, :-1], axis=-1)
    targets = case["tokens"][:, :, 1 : logps.shape[2] + 1].astype(jnp.int32)
    return jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]


def mean_nll(token_logps: Array, mask: Array) -> Array:
    """Over all tokens of the batch, as TRL reduces an auxiliary likelihood."""
    return -jnp.where(mask, token_logps, 0.0).sum() / lengths(mask).sum()


def pair_mean_nll(token_logps: Array, mask: Array) -> Array:
    """Mean over pairs of the mean over tokens, as ours does."""
    return mean(-jnp.where(mask, token_logps, 0.0).sum(axis=-1) / lengths(mask))
