"""GRPO: clipped policy gradient with group-relative advantages and a KL penalty in the loss."""

from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from objectives.kl import kl_estimate
from objectives.numerics import bool_mask, guarded_exp, masked, require_array
from objectives.types import ObjectiveOutput, Scalar

LossKLEstimator = Literal["k2", "k3"]


class Surrogate(NamedTuple):
    """Per-token policy loss and where the clip took its gradient away; all of one shape, float32."""

    losses: Array
    clipped_low: Array
    clipped_high: Array


def clipped_surrogate(
    *,
    ratio: Float[Array, "..."],
    advantages: Float[Array, "..."],
    clip_eps_low: Scalar,
    clip_eps_high: Scalar,
) -> Surrogate:
    """The pessimistic surrogate of PPO.

    `loss = -min(ratio * A, clip(ratio, 1 - eps_low, 1 + eps_high) * A)`

    Written as a selection: the ratio is replaced by its bound only if A > 0 and it is above, or A < 0 and it
    is below. The value is the same, and at the bound itself the gradient is that of the unclipped side (as
    in the sign table of the tests) instead of an average of both.

    Source: Schulman et al. 2017, Eq. 7; separate bounds, Yu et al. 2025 (DAPO), Eq. 10.

    Args:
      ratio: `pi / pi_old`, unitless, any shape; carries the gradient.
      advantages: same shape; no gradient passes.
      clip_eps_low: >= 0.
      clip_eps_high: >= 0.

    Returns:
      The losses, and 1.0 where the lower / upper bound was active.
    """
    chex.assert_equal_shape([ratio, advantages])
    advantages = jax.lax.stop_gradient(advantages)
    low, high = 1.0 - clip_eps_low, 1.0 + clip_eps_high
    clipped_low = (advantages < 0) & (ratio < low)
    clipped_high = (advantages > 0) & (ratio > high)
    bounded = jnp.where(clipped_low, low, jnp.where(clipped_high, high, ratio))
    return Surrogate(-bounded * advantages, clipped_low.astype(jnp.float32), clipped_high.astype(jnp.float32))


def grpo_loss(
    *,
    policy_logps: Float[Array, "B T"],
    old_logps: Float[Array, "B T"],
    advantages: Float[Array, " B"],
    completion_mask: Bool[Array, "B T"],
    clip_eps_low: Scalar = 0.2,
    clip_eps_high: Scalar = 0.2,
    ref_logps: Float[Array, "B T"] | None = None,
    beta: Scalar = 0.0,
    kl_estimator: LossKLEstimator = "k3",
) -> ObjectiveOutput:
    """Token-level clipped surrogate plus `beta` times a KL estimate to the reference.

    `loss_t = -min(ratio_t A, clip(ratio_t, 1 - eps_low, 1 + eps_high) A) + beta * k_t`,
    `ratio_t = exp(l_t - l_old_t)`

    Source: Shao et al. 2024 (DeepSeekMath), Eq. 3 and 4. The caller picks the member of the family:
      GRPO: `group_advantages` as it is, reduced by `sequence_mean`.
      Dr. GRPO: `group_advantages(normalization="none")`, reduced by `constant`, beta 0.
      DAPO: `clip_eps_high=0.28`, reduced by `token_mean`, beta 0; its sampling and penalty are elsewhere.
      Clipped RLOO: `group_advantages(baseline="leave_one_out", normalization="none")`.

    Args:
      policy_logps: `l`, nats, log-probs of the sampled tokens under the policy being trained.
      old_logps: `l_old`, nats, under the policy that sampled. No gradient passes.
      advantages: one per sequence. No gradient passes.
      completion_mask: True on the completion, its EOS included.
      clip_eps_low: lower clip distance, >= 0.
      clip_eps_high: upper clip distance, >= 0; larger than the lower one is "clip-higher".
      ref_logps: `l_ref`, nats, under the frozen reference. No gradient passes. None: no KL term.
      beta: KL coefficient; 0 with `ref_logps` only measures the KL.
      kl_estimator: k3 as published, or k2, whose gradient is that of KL(policy || ref); see `kl_estimate`.

    Returns:
      losses `[B, T]`, 0 where masked. Metrics, all `[B, T]`: `ratio`; `approx_kl` (k3 of KL(old || policy));
      `clip_fraction_low`, `clip_fraction_high` and `clip_fraction`, 1 where the clip removed the gradient;
      `kl_ref` (k3 of KL(policy || ref) whichever estimator is in the loss, so arms compare), if `ref_logps`
      is given. The first on-policy step has losses that sum to about 0 with a gradient that is not: log the
      gradient norm.

    Raises:
      ValueError: `kl_estimator` other than k2 or k3, or `beta` without `ref_logps`.

    Differs from the paper: two clip bounds (the paper's one epsilon is both); ratio and k3 continue linearly
      beyond 20 nats.
    """
    if kl_estimator not in ("k2", "k3"):
        raise ValueError(
            f"kl_estimator: got {kl_estimator!r}, expected k2 or k3 because k1 belongs in the reward: as a "
            "loss its expected gradient is zero (E[grad log pi] = 0), noise with no pull to the reference"
        )
    require_array("ref_logps", ref_logps, "beta", beta)
    chex.assert_shape(advantages, (policy_logps.shape[0],))

    mask = bool_mask(completion_mask)
    policy_logps = masked(policy_logps, mask)
    old_logps = jax.lax.stop_gradient(masked(old_logps, mask))
    token_advantages = masked(jnp.broadcast_to(advantages[:, None], mask.shape), mask)

    ratio = guarded_exp(policy_logps - old_logps)
    losses, clipped_low, clipped_high = clipped_surrogate(
        ratio=ratio, advantages=token_advantages, clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high
    )
    metrics = {
        "ratio": ratio,
        "approx_kl": kl_estimate(old_logps, policy_logps, "k3"),
        "clip_fraction_low": clipped_low,
        "clip_fraction_high": clipped_high,
        "clip_fraction": clipped_low + clipped_high,
    }
    if ref_logps is not None:
        ref_logps = masked(ref_logps, mask)
        losses = losses + beta * kl_estimate(policy_logps, ref_logps, kl_estimator)
        metrics["kl_ref"] = kl_estimate(policy_logps, ref_logps, "k3")
    return ObjectiveOutput(losses, jax.lax.stop_gradient(metrics))
