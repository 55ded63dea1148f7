"""Kahneman-Tversky optimisation: single completions, each labelled desirable or undesirable."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from objectives.numerics import bool_mask
from objectives.pairs import float32_rows
from objectives.reduce import example_mean
from objectives.types import ObjectiveOutput, Scalar, Subset, require_choice

KTOLossType = Literal["kto", "apo_zero_unpaired"]


def kto_reference_point(
    *, policy_kl_logps: Float[Array, " B"], ref_kl_logps: Float[Array, " B"], weights: Float[Array, " B"] | None = None
) -> Float[Array, ""]:
    """What a completion's log-ratio is compared with: an estimate of `KL(policy || ref)`.

    `z = max(0, mean_b (l - l_ref))`, over prompts each with the completion of *another* prompt

    Source: Ethayarajh et al. 2024 (KTO).

    Args:
      policy_kl_logps: `[B]`, nats, summed over the mismatched completion. No gradient passes.
      ref_kl_logps: `[B]`, nats, likewise under the reference.
      weights: `[B]`, non-negative; None means 1. Rows of weight 0 may hold NaN.

    Returns:
      z, float32 scalar, nats, >= 0, without gradient; 0 where nothing counts. Give it the *global* batch:
      the mean is inside the loss, so micro-batches share one z or they are not one batch.
    """
    policy, ref = float32_rows(policy_kl_logps, ref_kl_logps)
    return jax.lax.stop_gradient(jax.nn.relu(example_mean(policy - ref, weights).mean()))


def kto_loss(
    *,
    policy_logps: Float[Array, " B"],
    ref_logps: Float[Array, " B"],
    desirable: Bool[Array, " B"],
    reference_point: Scalar | Float[Array, " B"],
    beta: Scalar,
    desirable_weight: Scalar = 1.0,
    undesirable_weight: Scalar = 1.0,
    loss_type: KTOLossType = "kto",
) -> ObjectiveOutput:
    """Saturating loss of a gain over the reference point, for desirable and undesirable completions apart.

    `x = l - l_ref`; desirable `lD (1 - sigmoid(b (x - z)))`, undesirable `lU (1 - sigmoid(b (z - x)))`
      kto: `z` of `kto_reference_point`; apo_zero_unpaired: `z = 0`

    Source: Ethayarajh et al. 2024 (KTO), Eq. 7; apo_zero_unpaired, D'Oosterlinck et al. 2024, Eq. 7.

    Args:
      policy_logps: `l`, `[B]`, nats, summed over the completion.
      ref_logps: `l_ref`, `[B]`, nats, under the frozen reference. No gradient passes.
      desirable: `[B]`, bool.
      reference_point: z, nats, from `kto_reference_point`, scalar or `[B]`. No gradient passes. With
        apo_zero_unpaired a literal 0.
      beta: b > 0, inverse temperature; 0.1 is common.
      desirable_weight: lD > 0.
      undesirable_weight: lU > 0; the paper balances `lD * #desirable` against `lU * #undesirable`.
      loss_type: kto or apo_zero_unpaired.

    Returns:
      losses `[B]`, half the weight at x = z. Metrics: `rewards` (`beta x`), `logps` and `kl` (z), `[B]`; over
      the rows of each label, as `Subset`s, `rewards_desirable`, `rewards_undesirable`, `logps_desirable`,
      `logps_undesirable`, `accuracy_desirable` and `accuracy_undesirable` (1 where x is on the right side of
      z). There is no pair, so the margin is the difference of the two reduced rewards.

    Raises:
      ValueError: unknown loss_type, or a reference point given to apo_zero_unpaired.

    Differs from the paper: apo_zero_unpaired. The weights enter the losses, not the denominator (as TRL).
    """
    require_choice("loss_type", loss_type, KTOLossType)
    is_zero = isinstance(reference_point, int | float) and reference_point == 0
    if loss_type == "apo_zero_unpaired" and not is_zero:
        raise ValueError(f"reference_point: given, but it would have no effect with loss_type {loss_type!r}; pass 0")
    policy, ref = float32_rows(policy_logps, ref_logps)
    chex.assert_equal_shape([policy, desirable])
    desirable = bool_mask(desirable)
    point = jax.lax.stop_gradient(jnp.broadcast_to(jnp.asarray(reference_point, jnp.float32), policy.shape))

    log_ratio = policy - jax.lax.stop_gradient(ref)
    gain = jnp.where(desirable, log_ratio - point, point - log_ratio)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight).astype(jnp.float32)
    losses = weight * jax.nn.sigmoid(-beta * gain)

    rewards, is_right = beta * log_ratio, (gain > 0).astype(jnp.float32)
    good = desirable.astype(jnp.float32)
    metrics = {
        "rewards": rewards,
        "logps": policy,
        "kl": point,
        "rewards_desirable": Subset(rewards, good),
        "rewards_undesirable": Subset(rewards, 1.0 - good),
        "logps_desirable": Subset(policy, good),
        "logps_undesirable": Subset(policy, 1.0 - good),
        "accuracy_desirable": Subset(is_right, good),
        "accuracy_undesirable": Subset(is_right, 1.0 - good),
    }
    return ObjectiveOutput(losses, jax.lax.stop_gradient(metrics))
