"""Group-relative advantages: the critic-free baselines of GRPO, Dr. GRPO and RLOO.

Layout: N = P * G rewards, P prompts with G completions each, `[p1, p1, ..., p2, p2, ...]`. Call on the
global batch: a group must not straddle micro-batches.
"""

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from objectives.types import Scalar

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

    `A_i = (r_i - b_i) / (std + eps)`, with `b_i = mean_j r_j` or (leave-one-out) `b_i = mean_{j != i} r_j`.

    Source: GRPO, Shao et al. 2024 (DeepSeekMath), Section 4.1.2 (mean, group). Dr. GRPO, Liu et al. 2025,
    Section 3.2 (mean, none). RLOO, Ahmadian et al. 2024, after Kool et al. 2019 (leave_one_out, none).

    Equal rewards in a group give exactly 0: rewards are taken relative to the group's first one before
    averaging, so the mean of G equal floats has no rounding error that a small std could blow up.

    Args:
      rewards: `[N]`, any float dtype, in reward units. No gradient passes.
      group_size: G, static, >= 2.
      baseline: what is subtracted.
      normalization: `group` divides by the std of the group's rewards, `batch` by that of all N, `none` by
        nothing.
      ddof: delta degrees of freedom of the std, static; 1 (sample std) as TRL, 0 (population std).
      eps: added to the std.

    Returns:
      `[N]`, float32.

    Raises:
      ValueError: group_size below 2 or not dividing N, ddof outside [0, G), unknown baseline or
        normalization.

    Differs from the paper: the paper adds no eps and does not state its ddof.
    """
    grouped = _grouped(rewards, group_size)
    if not 0 <= ddof < group_size:
        raise ValueError(f"ddof: got {ddof}, expected 0 <= ddof < group_size = {group_size}")
    shifted = grouped - grouped[:, :1]
    centered = shifted - shifted.mean(axis=1, keepdims=True)

    if baseline == "leave_one_out":  # r_i - mean_{j != i} r_j = (r_i - mean) * G / (G - 1)
        advantages = centered * (group_size / (group_size - 1))
    elif baseline == "mean":
        advantages = centered
    else:
        raise ValueError(f"baseline: got {baseline!r}, expected one of {', '.join(get_args(Baseline))}")

    if normalization == "none":
        return advantages.reshape(-1)
    elif normalization == "group":
        std = shifted.std(axis=1, keepdims=True, ddof=ddof)
    elif normalization == "batch":
        std = (grouped - grouped[0, 0]).std(keepdims=True, ddof=ddof)
    else:
        known = ", ".join(get_args(Normalization))
        raise ValueError(f"normalization: got {normalization!r}, expected one of {known}")
    return jnp.where(centered == 0, 0.0, advantages / (std + eps)).reshape(-1)  # 0, not 0/0, at eps = 0


def zero_std_groups(rewards: Float[Array, " N"], group_size: int) -> Bool[Array, " P"]:
    """True for each prompt whose G rewards are all equal: it teaches nothing; dynamic sampling replaces it.

    Args:
      rewards: `[N]`, any float dtype.
      group_size: G, static, >= 2.

    Returns:
      `[P]` with P = N / G.

    Raises:
      ValueError: group_size below 2 or not dividing N.
    """
    grouped = _grouped(rewards, group_size)
    return (grouped == grouped[:, :1]).all(axis=1)


def frac_reward_zero_std(rewards: Float[Array, " N"], group_size: int) -> Float[Array, ""]:
    """Fraction of groups whose rewards are all equal; see `zero_std_groups`.

    Args:
      rewards: `[N]`, any float dtype.
      group_size: G, static, >= 2.

    Returns:
      float32 scalar in [0, 1].

    Raises:
      ValueError: group_size below 2 or not dividing N.
    """
    return zero_std_groups(rewards, group_size).astype(jnp.float32).mean()


def _grouped(rewards: Array, group_size: int) -> Array:
    chex.assert_rank(rewards, 1)
    if group_size < 2:
        raise ValueError(
            f"group_size: got {group_size}, expected >= 2 because a completion is compared with its group"
        )
    if rewards.shape[0] % group_size:
        raise ValueError(f"rewards: got {rewards.shape[0]}, expected a multiple of group_size = {group_size}")
    return jax.lax.stop_gradient(rewards.astype(jnp.float32)).reshape(-1, group_size)
