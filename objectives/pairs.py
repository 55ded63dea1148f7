"""What the objectives on (chosen, rejected) pairs share. Shapes: B pairs."""

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
    scale: Scalar, chosen: Array, rejected: Array, logps_chosen: Array, logps_rejected: Array
) -> dict[str, Array]:
    """The metrics every objective on pairs logs, `[B]`; the reward is `scale` times what each side is judged by.

    `reward_accuracy` is 1 where the margin is positive: a tie is 0. The log-probs are the sums of the two sides.
    """
    margin = scale * (chosen - rejected)  # the difference first: a tie then rounds to 0 however XLA fuses it
    logps_chosen, logps_rejected = float32_rows(logps_chosen, logps_rejected)
    return {
        "rewards_chosen": scale * chosen,
        "rewards_rejected": scale * rejected,
        "reward_margin": margin,
        "reward_accuracy": (margin > 0).astype(jnp.float32),
        "logps_chosen": logps_chosen,
        "logps_rejected": logps_rejected,
    }


def require_lengths(lengths: Mapping[str, Array | None], needed: Collection[str], reason: str) -> None:
    """Raises ValueError where token counts that `needed` names are None."""
    for name, array in lengths.items():
        if array is None and name in needed:
            raise ValueError(f"{name}: got None, expected token counts [B] because {reason} divides by them")
