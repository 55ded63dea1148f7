"""Process reward models: a two-class verdict at the last token of each step.

Shapes: B solutions, T tokens, S steps. Class 1 is "correct". An outcome reward model is the same with one label, at the
solution's last token.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from objectives.numerics import bool_mask, masked
from objectives.types import ObjectiveOutput, require_choice

StepReduction = Literal["min", "prod", "last", "mean"]


def prm_loss(
    *, step_logits: Float[Array, "B T 2"], labels: Float[Array, "B T"], label_mask: Bool[Array, "B T"]
) -> ObjectiveOutput:
    """Two-class cross-entropy at the labelled tokens, on hard or soft labels.

    `loss_t = -p_t log q_t - (1 - p_t) log(1 - q_t)`, `q_t = softmax(z_t)_1 = sigmoid(z_t1 - z_t0)`

    Source: Lightman et al. 2023, Section 2.6 and Appendix E (hard labels); soft labels, Wang et al. 2023
    (Math-Shepherd), Eq. 2 and 4; one label at the end, Cobbe et al. 2021.

    Args:
      step_logits: `z`, `[B, T, 2]`, any float dtype, of "incorrect" (0) and "correct" (1) at each token.
      labels: `p`, `[B, T]`, in [0, 1]: 0 or 1, or the fraction of completions from this step that were right.
      label_mask: `[B, T]`, True on each labelled step's last token; all else is unlabelled.
    Returns losses `[B, T]`, log 2 at equal logits; reduced by `token_mean` each step counts once. Metrics, all
    `[B, T]`: `accuracy` (`q > 1/2` agrees with `p > 1/2`), `step_prob` (q), `label`.
    """
    mask = bool_mask(label_mask)
    chex.assert_shape(step_logits, (*mask.shape, 2))
    step_logits = step_logits.astype(jnp.float32)
    margin = masked(step_logits[..., 1] - step_logits[..., 0], mask)
    labels = jax.lax.stop_gradient(masked(labels, mask))
    losses = labels * jax.nn.softplus(-margin) + (1.0 - labels) * jax.nn.softplus(margin)
    metrics = {
        "accuracy": ((margin > 0) == (labels > 0.5)).astype(jnp.float32),
        "step_prob": jax.nn.sigmoid(margin),
        "label": labels,
    }
    return ObjectiveOutput(jnp.where(mask, losses, 0.0), jax.lax.stop_gradient(metrics))


def solution_scores(
    *, step_probs: Float[Array, "B S"], step_mask: Bool[Array, "B S"], reduction: StepReduction
) -> Float[Array, " B"]:
    """One score for a solution from the probabilities that its steps are correct.

    `min_s q_s` (min), `prod_s q_s` (prod), `q_S` (last) or `mean_s q_s` (mean)

    Source: Lightman et al. 2023, Section 2.6 (prod, min); Wang et al. 2023 (Math-Shepherd), Section 3.4 (min); Snell
    et al. 2024, Section 5.1 (last); Uesato et al. 2022.

    Args:
      step_probs: q, in [0, 1]; one per step or, with the mask on the steps' last tokens, one per token.
      step_mask: True on the steps.
      reduction: a product favours short solutions, a mean long ones; `last` is the choice for an outcome model.
    Returns `[B]`, in [0, 1], without gradient; 0 for a solution without a step. Raises ValueError on another reduction.
    """
    require_choice("reduction", reduction, StepReduction)
    mask = bool_mask(step_mask)
    probs = jax.lax.stop_gradient(masked(step_probs, mask))
    if reduction == "min":
        scores = jnp.where(mask, probs, 1.0).min(axis=1)
    elif reduction == "prod":
        scores = jnp.where(mask, probs, 1.0).prod(axis=1)
    elif reduction == "last":
        last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        scores = jnp.take_along_axis(probs, last[:, None], axis=1)[:, 0]
    else:
        scores = probs.sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1).astype(jnp.float32)
    return jnp.where(mask.any(axis=1), scores, 0.0)
