"""The only place where `[B, T]` becomes a number.

Every function returns `WeightedSum(total, count)`, float32, totals in nats. The step adds both over micro-batches and
devices and divides once, so gradient accumulation, packing and mesh shape never change a loss.

Losses `[B, T]`, of any float dtype, go with a mask `[B, T]`. Masked slots and rows of weight 0 may hold NaN or infinity
without reaching value or gradient. The optional per-sequence `weights` `[B]` (mixtures, rejection sampling, 0 for a row
that only pads the batch) enter total *and* count, so doubling all of them changes nothing. To make a sequence matter
more without renormalising (difficulty weighting in RL), scale its advantage instead.
"""

from collections.abc import Mapping
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from objectives.numerics import bool_mask, masked
from objectives.types import Scalar, Subset, WeightedSum, require_choice

Aggregation = Literal["token_mean", "sequence_mean", "constant"]


def token_mean(
    losses: Float[Array, "B T"], mask: Bool[Array, "B T"], *, weights: Float[Array, " B"] | None = None
) -> WeightedSum:
    """Mean over all unmasked tokens of the global batch; counts (weighted) tokens.

    `sum_b w_b sum_t m_bt loss_bt / sum_b w_b sum_t m_bt`

    Source: DAPO, Yu et al. 2025, Eq. 8; also plain next-token cross-entropy.
    """
    return _weighted_sum(sequence_sum(losses, mask), _lengths(mask), weights)


def sequence_mean(
    losses: Float[Array, "B T"], mask: Bool[Array, "B T"], *, weights: Float[Array, " B"] | None = None
) -> WeightedSum:
    """Mean over sequences of the mean over their tokens; counts (weighted) sequences.

    `sum_b w_b (sum_t m_bt loss_bt / |y_b|) / sum_b w_b`, over sequences with `|y_b| = sum_t m_bt >= 1`.

    Source: GRPO, Shao et al. 2024 (DeepSeekMath), Eq. 3.

    Differs from the paper: a sequence without an unmasked token is left out of the count too. TRL counts it, so that
    its loss is ours times the share of sequences with a token.
    """
    lengths = _lengths(mask)
    means = sequence_sum(losses, mask) / jnp.maximum(lengths, 1.0)
    return _weighted_sum(means, (lengths > 0).astype(jnp.float32), weights)


def constant(
    losses: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    max_length: Scalar,
    *,
    weights: Float[Array, " B"] | None = None,
) -> WeightedSum:
    """Sum over tokens, divided by a length that no completion can influence; counts (weighted) rows times `L_max`.

    `sum_b w_b sum_t m_bt loss_bt / (sum_b w_b * L_max)`

    Source: Dr. GRPO, Liu et al. 2025, Section 3.2 and Listing 1 (there `MAX_TOKENS`).

    `max_length` is `L_max`, tokens: the configured completion limit, *not* the T this batch was padded to. Every row of
    weight 1 counts, also a fully masked one, such as a truncated completion; one that only fills the batch needs 0.
    """
    totals = sequence_sum(losses, mask)
    return _weighted_sum(totals, jnp.full_like(totals, max_length), weights)


def reduce(
    losses: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    aggregation: Aggregation,
    max_length: Scalar | None = None,
    weights: Float[Array, " B"] | None = None,
) -> WeightedSum:
    """`token_mean`, `sequence_mean` or `constant`, by name: the aggregation axis of an ablation.

    Raises ValueError on another name, or on `constant` without `max_length` (tokens), which the others do not read.
    """
    require_choice("aggregation", aggregation, Aggregation)
    if aggregation == "token_mean":
        return token_mean(losses, mask, weights=weights)
    if aggregation == "sequence_mean":
        return sequence_mean(losses, mask, weights=weights)
    if max_length is None:
        raise ValueError("max_length: got None, expected the completion limit in tokens for 'constant'")
    return constant(losses, mask, max_length, weights=weights)


def example_mean(losses: Float[Array, " B"], weights: Float[Array, " B"] | None = None) -> WeightedSum:
    """Mean over examples (pairs, sequences), which it counts: `sum_b w_b loss_b / sum_b w_b`; losses are `[B]`."""
    chex.assert_rank(losses, 1)
    losses = losses.astype(jnp.float32)
    return _weighted_sum(losses, jnp.ones_like(losses), weights)


def reduce_metrics(
    metrics: Mapping[str, Array | Subset],
    *,
    mask: Bool[Array, "B T"] | None = None,
    weights: Float[Array, " B"] | None = None,
) -> dict[str, WeightedSum]:
    """Reduce `ObjectiveOutput.metrics`: `[B, T]` by `token_mean`, `[B]` by `example_mean`.

    A `Subset` is the `example_mean` of its rows; where it has none, total and count are 0. Mask and weights are those
    of the losses. Raises ValueError on a metric that is neither `[B]` nor `[B, T]`, or on `[B, T]` without a mask.
    """
    reduced = {}
    for name, values in metrics.items():
        if isinstance(values, Subset):
            rows = values.where if weights is None else values.where * weights
            reduced[name] = example_mean(values.values, rows)
        elif values.ndim == 1:
            reduced[name] = example_mean(values, weights)
        elif values.ndim == 2 and mask is not None:
            reduced[name] = token_mean(values, mask, weights=weights)
        else:
            expected = "[B] or [B, T]" if values.ndim != 2 else "a mask, because the metric is per token"
            raise ValueError(f"metrics[{name!r}]: got shape {values.shape}, expected {expected}")
    return reduced


def sequence_sum(values: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """`sum_t m_bt values_bt` in float32, 0 for an empty row; turns token into sequence log-probs."""
    chex.assert_rank(values, 2)
    return masked(values, mask).sum(axis=1)


def _lengths(mask: Array) -> Array:
    return bool_mask(mask).sum(axis=1).astype(jnp.float32)


def _weighted_sum(totals: Array, counts: Array, weights: Array | None) -> WeightedSum:
    if weights is not None:
        chex.assert_equal_shape([totals, weights])
        weights = jax.lax.stop_gradient(weights.astype(jnp.float32))
        totals = jnp.where(weights != 0, totals, 0.0) * weights
        counts = counts * weights
    return WeightedSum(totals.sum(), counts.sum())
