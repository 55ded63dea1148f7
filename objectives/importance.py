"""Importance weights that correct for a sampler whose probabilities differ from the trainer's."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from objectives.numerics import bool_mask, guarded_exp, masked
from objectives.types import Scalar, require_choice

ImportanceLevel = Literal["token", "sequence"]
ImportanceMode = Literal["truncate", "mask"]


def importance_weights(
    *,
    old_logps: Float[Array, "B T"],
    sampler_logps: Float[Array, "B T"],
    completion_mask: Bool[Array, "B T"],
    level: ImportanceLevel,
    mode: ImportanceMode,
    cap: Scalar,
    floor: Scalar = 0.0,
) -> Float[Array, "B T"]:
    """Truncated or masked importance weights of the trainer's old policy against the sampler.

    `w_t = exp(l_old_t - l_sampler_t)` (token) or `w_t = exp(sum_u (l_old_u - l_sampler_u))` (sequence); then
    `min(max(w, floor), cap)` (truncate) or `w [floor <= w <= cap]` (mask).

    The two differ although the parameters are the same: other kernels, other precision, a sampler with top-k or top-p.
    `grpo_loss` multiplies its surrogate by these weights, while its ratio stays `pi / pi_old`.

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training" (token, truncate);
    Ionides 2008 for the truncation; masked on both sides, Ling Team 2025 (IcePop).

    Args:
      old_logps: `l_old`, `[B, T]`, by the trainer, before the first update on this batch.
      sampler_logps: `l_sampler`, `[B, T]`, of the distribution really sampled from.
      level: `sequence` multiplies a completion's ratios: unbiased, with a variance that grows with length.
      mode: `truncate` keeps every token at a bounded weight, `mask` drops those outside.
      cap: largest weight, > 1; 2 is common at token level.
      floor: smallest weight, in [0, 1); 0 is no lower bound.
    Returns `[B, T]`, equal along a row at sequence level, without gradient. Raises ValueError on an unknown literal.
    Differs from the paper: the lower bound; weights continue linearly beyond e^20.
    """
    require_choice("level", level, ImportanceLevel)
    require_choice("mode", mode, ImportanceMode)
    mask = bool_mask(completion_mask)
    gap = masked(old_logps, mask) - masked(sampler_logps, mask)
    if level == "sequence":
        gap = jnp.broadcast_to(gap.sum(axis=1, keepdims=True), mask.shape)
    weights = guarded_exp(gap)
    if mode == "truncate":
        weights = jnp.clip(weights, floor, cap)
    else:
        weights = jnp.where((weights >= floor) & (weights <= cap), weights, 0.0)
    return jax.lax.stop_gradient(jnp.where(mask, weights, 0.0))
