"""Reward models from comparisons: pairs, rankings, and ensembles of the scores they learn."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from objectives.numerics import bool_mask, is_literal_zero, masked, refuse_unused
from objectives.pairs import float32_rows
from objectives.types import ObjectiveOutput, Scalar, Subset, require_choice

EnsembleReduction = Literal["mean", "min", "mean_minus_variance"]


def bradley_terry_loss(
    *,
    chosen_scores: Float[Array, " B"],
    rejected_scores: Float[Array, " B"],
    margins: Float[Array, " B"] | None = None,
    soft_labels: Float[Array, " B"] | None = None,
    center_coef: Scalar = 0.0,
) -> ObjectiveOutput:
    """Negative log-likelihood of a comparison under the Bradley-Terry model.

    `d = r_c - r_r - margin`; `loss = -p log sigmoid(d) - (1 - p) log sigmoid(-d) + c (r_c + r_r)^2`

    Source: Ouyang et al. 2022, Eq. 1 with K = 2; margin, Touvron et al. 2023 (Llama 2), Eq. 2; centering, Eisenstein
    et al. 2023, "Helping or Herding?".

    Args:
      chosen_scores, rejected_scores: `r_c`, `r_r`, `[B]`, read at the last unmasked token; unitless, carry the
        gradient.
      margins: `[B]`, >= 0, how much better the chosen one is, in units of the score; None means 0.
      soft_labels: `p`, `[B]`, in [0, 1], the probability that "chosen" is the better one; None means 1.
      center_coef: c >= 0; the scores are identified only up to a constant, and this pulls their mean to 0.
    Returns losses `[B]`, one per pair, log 2 at equal scores without a margin. Metrics, all `[B]`: `rewards_chosen`,
    `rewards_rejected`, `reward_margin` (`r_c - r_r`), `reward_accuracy` (1 where that is positive; a tie is 0),
    `center` (`(r_c + r_r)^2`).
    Differs from the paper: Llama 2 has no soft labels, with which the margin keeps its side, `-d` for the flipped pair.
    """
    given = (x for x in (margins, soft_labels) if x is not None)
    chosen, rejected, *_ = float32_rows(chosen_scores, rejected_scores, *given)
    difference, center = chosen - rejected, jnp.square(chosen + rejected)
    shifted = difference
    if margins is not None:
        shifted = difference - jax.lax.stop_gradient(margins.astype(jnp.float32))
    losses = -jax.nn.log_sigmoid(shifted)
    if soft_labels is not None:
        label = jax.lax.stop_gradient(soft_labels.astype(jnp.float32))
        losses = label * losses - (1.0 - label) * jax.nn.log_sigmoid(-shifted)
    losses = losses + center_coef * center
    metrics = {
        "rewards_chosen": chosen,
        "rewards_rejected": rejected,
        "reward_margin": difference,
        "reward_accuracy": (difference > 0).astype(jnp.float32),
        "center": center,
    }
    return ObjectiveOutput(losses, jax.lax.stop_gradient(metrics))


def ranking_loss(
    *, scores: Float[Array, "P K"], ranks: Int[Array, "P K"], mask: Bool[Array, "P K"], center_coef: Scalar = 0.0
) -> ObjectiveOutput:
    """All pairs of a ranked list, averaged within the prompt.

    `loss_p = mean over pairs (i, j) with rank_i < rank_j of [-log sigmoid(r_i - r_j) + c (r_i + r_j)^2]`

    Source: Ouyang et al. 2022, Eq. 1 (there `K (K - 1) / 2` pairs without ties).

    Args:
      scores: `[P, K]`, of K completions for each of P prompts. Carries the gradient.
      ranks: `[P, K]`, lower is better; equal ranks form no pair.
      mask: `[P, K]`, True on real completions.
      center_coef: c >= 0, as in `bradley_terry_loss`.
    Returns losses `[P]`, 0 for a prompt without a pair. Metrics `[P]`: `pairs`, how many; `no_pair`, 1 where there is
    none (give that prompt weight 0, or it dilutes the mean); and over the prompts that have a pair, the means over
    their pairs `reward_margin` (`r_i - r_j`) and `reward_accuracy`, as `Subset`s.
    Differs from the paper: ties, missing completions and centering; with K = 2 it is `bradley_terry_loss`.
    """
    chex.assert_rank([scores, ranks, mask], 2)
    chex.assert_equal_shape([scores, ranks, mask])
    mask = bool_mask(mask)
    scores = masked(scores, mask)
    left, right = scores[:, :, None], scores[:, None, :]
    is_pair = mask[:, :, None] & mask[:, None, :] & (ranks[:, :, None] < ranks[:, None, :])
    pairs = is_pair.sum((1, 2)).astype(jnp.float32)

    def pair_mean(values: Array) -> Array:
        return jnp.where(is_pair, values, 0.0).sum((1, 2)) / jnp.maximum(pairs, 1.0)

    difference = left - right
    losses = pair_mean(-jax.nn.log_sigmoid(difference) + center_coef * jnp.square(left + right))
    has_pair = (pairs > 0).astype(jnp.float32)
    metrics = {
        "pairs": pairs,
        "no_pair": 1.0 - has_pair,
        "reward_margin": Subset(pair_mean(difference), has_pair),
        "reward_accuracy": Subset(pair_mean((difference > 0).astype(jnp.float32)), has_pair),
    }
    return ObjectiveOutput(losses, jax.lax.stop_gradient(metrics))


def ensemble_score(
    *, scores: Float[Array, "E B"], reduction: EnsembleReduction, variance_coef: Scalar = 0.0
) -> Float[Array, " B"]:
    """One reward from E reward models, pessimistic where they disagree.

    `R = mean_e r_e` (mean), `R = min_e r_e` (min) or `R = mean_e r_e - c * mean_e (r_e - mean r)^2`
    (mean_minus_variance)

    Source: Coste et al. 2023, "Reward model ensembles help mitigate overoptimization" (mean, worst-case and
    uncertainty-weighted optimisation, in this order).

    Scores are `[E, B]`, of E models for each sequence, on a common scale, without gradient: it is a reward. c is the
    `variance_coef` >= 0, per unit of score. Raises ValueError on another reduction, or a coefficient that it ignores.
    """
    require_choice("reduction", reduction, EnsembleReduction)
    chex.assert_rank(scores, 2)
    scores = jax.lax.stop_gradient(scores.astype(jnp.float32))
    if reduction == "mean_minus_variance":
        return scores.mean(0) - variance_coef * scores.var(0)
    refuse_unused({"variance_coef": not is_literal_zero(variance_coef)}, (), f"reduction {reduction!r}")
    return scores.mean(0) if reduction == "mean" else scores.min(0)
