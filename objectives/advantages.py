"""Critic-free advantages: GRPO, Dr. GRPO, RLOO, REINFORCE++ and GRPO with process supervision.

Layout: N = P * G rewards `[N]`, P prompts with `group_size` G >= 2 (static) completions each, `[p1, p1, ..., p2, ...]`;
a ValueError where it does not divide N. Call on the global batch: a group must not straddle micro-batches. No gradient
passes.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from objectives.gae import gae, token_rewards, whiten
from objectives.numerics import bool_mask, masked
from objectives.types import Scalar, require_choice

Baseline = Literal["mean", "leave_one_out"]
Normalization = Literal["group", "batch", "none"]


def group_advantages(
    rewards: Float[Array, " N"],
    group_size: int,
    *,
    baseline: Baseline = "mean",
    normalization: Normalization = "group",
    ddof: int = 1,
    eps: Scalar = 1e-4,
) -> Float[Array, " N"]:
    """Reward minus the group's baseline, optionally divided by a standard deviation.

    `A_i = (r_i - b_i) / (std + eps)`
      mean: `b_i = mean_j r_j`; leave_one_out: `b_i = mean_{j != i} r_j`
      group: `std = std_{j in group} r_j`; batch: `std = std_j r_j` over all N; none: `A_i = r_i - b_i`

    Source: GRPO, Shao et al. 2024 (DeepSeekMath), Section 4.1.2 (mean, group). Dr. GRPO, Liu et al. 2025, Section 3.2
    (mean, none). RLOO, Ahmadian et al. 2024, after Kool et al. 2019 (leave_one_out, none).

    Equal rewards in a group give exactly 0: rewards are taken relative to the group's first one before averaging, so
    the mean of G equal floats has no rounding error that a small std could blow up.

    Args:
      baseline: what is subtracted.
      normalization: `group` divides by the std of the group's rewards, `batch` by that of all N, `none` by nothing.
      ddof: delta degrees of freedom of the std, static, in [0, G); 1 (sample std) as TRL, 0 (population std).
      eps: added to the std.
    Returns `[N]`. Raises ValueError on a bad group size or ddof, or an unknown literal.
    Differs from the paper: the paper adds no eps and does not state its ddof.
    """
    grouped = _grouped(rewards, group_size)
    if not 0 <= ddof < group_size:
        raise ValueError(f"ddof: got {ddof}, expected 0 <= ddof < group_size = {group_size}")
    shifted = grouped - grouped[:, :1]
    centered = shifted - shifted.mean(axis=1, keepdims=True)

    require_choice("baseline", baseline, Baseline)
    require_choice("normalization", normalization, Normalization)
    advantages = centered
    if baseline == "leave_one_out":  # r_i - mean_{j != i} r_j = (r_i - mean) * G / (G - 1)
        advantages = centered * (group_size / (group_size - 1))
    if normalization == "none":
        return advantages.reshape(-1)
    if normalization == "group":
        std = shifted.std(axis=1, keepdims=True, ddof=ddof)
    else:
        std = (grouped - grouped[0, 0]).std(keepdims=True, ddof=ddof)
    return jnp.where(centered == 0, 0.0, advantages / (std + eps)).reshape(-1)  # 0, not 0/0, at eps = 0


def reinforce_pp_advantages(
    *,
    rewards: Float[Array, " N"],
    completion_mask: Bool[Array, "N T"],
    kl_penalty: Float[Array, "N T"] | None = None,
    kl_coef: Scalar = 0.0,
    gamma: Scalar = 1.0,
    weights: Float[Array, " N"] | None = None,
) -> Float[Array, "N T"]:
    """Discounted reward to go of each token, whitened over the global batch: no group, no critic.

    `A_t = sum_{u >= t} gamma^(u - t) r_u`, `r` of `token_rewards`; then `(A - mean) / std` over all tokens.

    Source: Hu et al. 2025 (REINFORCE++), Section 3.2, global advantage normalisation.

    Args:
      rewards: `[N]`, reward units, paid on the last completion token.
      kl_penalty: `[N, T]`, nats, an estimate of KL(policy || ref) per token, k1 as published.
      kl_coef: reward units per nat. Raises ValueError where it lacks its `kl_penalty`.
      gamma: discount per completion token; 1 as published.
      weights: `[N]`; rows of weight 0 do not enter mean and std, and get 0.
    Returns `[N, T]`; equal returns give exactly 0. Differs from the paper: gamma; std as in `whiten`.
    """
    paid = token_rewards(scores=rewards, completion_mask=completion_mask, kl_penalty=kl_penalty, kl_coef=kl_coef)
    to_go, _ = gae(
        rewards=paid, values=jnp.zeros_like(paid), completion_mask=completion_mask, gamma=gamma, gae_lambda=1.0
    )
    return whiten(values=to_go, mask=completion_mask, weights=weights)


def reinforce_pp_baseline_advantages(
    *,
    rewards: Float[Array, " N"],
    group_size: int,
    completion_mask: Bool[Array, "N T"],
    weights: Float[Array, " N"] | None = None,
) -> Float[Array, "N T"]:
    """REINFORCE++ with the group's mean as its baseline; the scale is still the global batch's.

    `A_i = r_i - mean_group`; then `(A - mean) / std` over all completion tokens of the batch.

    Source: Hu et al. 2025 (REINFORCE++), Section 3.3, REINFORCE++ w/ baseline; its KL is a k2 loss.

    Rows of weight 0 get 0 and do not enter mean and std, but do enter their group's mean. Returns `[N, T]`, exactly 0
    if each group's rewards are equal; a group of equal rewards beside others gets minus the batch's mean, which is 0
    only up to the lengths.

    Differs from the paper: mean and std are per token, as in its released code, not per completion.
    """
    centered = group_advantages(rewards, group_size, normalization="none")
    values = jnp.broadcast_to(centered[:, None], completion_mask.shape)
    return whiten(values=values, mask=completion_mask, weights=weights)


def process_advantages(
    *,
    step_rewards: Float[Array, "N T"],
    step_mask: Bool[Array, "N T"],
    completion_mask: Bool[Array, "N T"],
    group_size: int,
    ddof: int = 1,
    eps: Scalar = 1e-4,
) -> Float[Array, "N T"]:
    """GRPO with process supervision: step rewards normalised within the group, summed to go.

    `n_j = (r_j - mean(R)) / (std(R) + eps)`, `R` all step rewards of the group's completions;
    `A_t = sum_{j: end(j) >= t} n_j`

    Source: Shao et al. 2024 (DeepSeekMath), Section 4.1.3.

    Args:
      step_rewards: `[N, T]`, reward units, in the slot of each step's last token, as in `token_rewards`.
      step_mask: `[N, T]`, True on each step's last token; ends outside `completion_mask` are ignored.
      ddof: delta degrees of freedom of the std, static, 0 or 1, else a ValueError.
      eps: added to the std.
    Returns `[N, T]`, 0 on tokens after the last step's end; exactly 0 in a group whose step rewards are all equal, or
    that has one step only.
    Differs from the paper: the paper adds no eps and does not state its ddof.
    """
    if ddof not in (0, 1):
        raise ValueError(f"ddof: got {ddof}, expected 0 or 1")
    completions = bool_mask(completion_mask)
    ends = bool_mask(step_mask) & completions
    rows = _grouped(jnp.zeros(ends.shape[0]), group_size).shape[0]
    rewards = jax.lax.stop_gradient(masked(step_rewards, ends)).reshape(rows, -1)
    steps = ends.reshape(rows, -1)

    first = jnp.take_along_axis(rewards, jnp.argmax(steps, axis=1)[:, None], axis=1)
    shifted = jnp.where(steps, rewards - first, 0.0)  # equal rewards: exactly 0, as in `group_advantages`
    count = steps.sum(axis=1, keepdims=True).astype(jnp.float32)
    centered = jnp.where(steps, shifted - shifted.sum(axis=1, keepdims=True) / jnp.maximum(count, 1.0), 0.0)
    variance = jnp.square(centered).sum(axis=1, keepdims=True) / jnp.maximum(count - ddof, 1.0)
    scaled = jnp.where(centered == 0, 0.0, centered / (jnp.sqrt(variance) + eps)).reshape(ends.shape)
    to_go = jnp.cumsum(scaled[:, ::-1], axis=1)[:, ::-1]
    # After the last step's end the running sum is exactly 0: it starts there.
    return jnp.where(completions, to_go, 0.0)


def frac_reward_zero_std(rewards: Float[Array, " N"], group_size: int) -> Float[Array, ""]:
    """Fraction of prompts whose G rewards are all equal: they teach nothing."""
    grouped = _grouped(rewards, group_size)
    return (grouped == grouped[:, :1]).all(axis=1).astype(jnp.float32).mean()


def _grouped(rewards: Array, group_size: int) -> Array:
    chex.assert_rank(rewards, 1)
    if group_size < 2:
        raise ValueError(f"group_size: got {group_size}, expected >= 2 because a completion is compared with its group")
    if rewards.shape[0] % group_size:
        raise ValueError(f"rewards: got {rewards.shape[0]}, expected a multiple of group_size = {group_size}")
    return jax.lax.stop_gradient(rewards.astype(jnp.float32)).reshape(-1, group_size)
