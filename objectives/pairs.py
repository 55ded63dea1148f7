"""What the objectives on (chosen, rejected) pairs share.

Shapes: B pairs. A sequence log-prob is the *sum* over its completion, in nats; a length is its token count.
"""

from collections.abc import Collection, Mapping

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from objectives.types import Scalar


def float32_rows(*rows: Float[Array, " B"]) -> tuple[Array, ...]:
    """The arrays as float32, refused unless all have one shape `[B]`: any other would broadcast."""
    chex.assert_rank(rows, 1)
    chex.assert_equal_shape(rows)
    return tuple(x.astype(jnp.float32) for x in rows)


def mean_logps(logps: Float[Array, " B"], lengths: Float[Array, " B"]) -> Float[Array, " B"]:
    """`logps / max(length, 1)`: the mean over the tokens, 0 for an empty sequence (whose sum is 0)."""
    logps, lengths = float32_rows(logps, lengths)
    return logps / jnp.maximum(jax.lax.stop_gradient(lengths), 1.0)


def smoothed_nll(margin: Float[Array, " B"], label_smoothing: Scalar) -> Float[Array, " B"]:
    """`-(1 - e) log sigmoid(margin) - e log sigmoid(-margin)`."""
    nll, flipped_nll = -jax.nn.log_sigmoid(margin), -jax.nn.log_sigmoid(-margin)
    return (1.0 - label_smoothing) * nll + label_smoothing * flipped_nll


def pair_metrics(
    *, rewards_chosen: Array, rewards_rejected: Array, margin: Array, logps_chosen: Array, logps_rejected: Array
) -> dict[str, Array]:
    """The metrics every objective on pairs logs; `margin` is passed because only it rounds a tie to 0."""
    return {
        "rewards_chosen": rewards_chosen,
        "rewards_rejected": rewards_rejected,
        "reward_margin": margin,
        "reward_accuracy": (margin > 0).astype(jnp.float32),
        "logps_chosen": logps_chosen,
        "logps_rejected": logps_rejected,
    }


def is_literal_zero(scalar: Scalar) -> bool:
    """Whether a coefficient is off for certain; a traced one never is."""
    return isinstance(scalar, int | float) and scalar == 0


def refuse_unused(given: Mapping[str, bool], used: Collection[str], variant: str) -> None:
    """Refuse an option that the chosen variant would silently ignore.

    Args:
      given: by option name, whether the caller set it (a traced scalar counts as set).
      used: the names that have an effect.
      variant: what was chosen, for the message.

    Raises:
      ValueError: an option is given but not used.
    """
    for name, is_given in given.items():
        if is_given and name not in used:
            raise ValueError(f"{name}: given, but it would have no effect with {variant}")


def require_lengths(lengths: Mapping[str, Array | None], needed: Collection[str], reason: str) -> None:
    """Refuse missing token counts.

    Raises:
      ValueError: an array that `needed` names is None.
    """
    for name, array in lengths.items():
        if array is None and name in needed:
            raise ValueError(f"{name}: got None, expected token counts [B] because {reason} divides by them")
