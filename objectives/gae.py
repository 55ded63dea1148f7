"""Token rewards, generalised advantage estimation and whitening: what PPO computes once per rollout.

Shapes: B completions, T slots. The completion may start at any slot and may have holes (tool output): masked slots are
skipped, as if its tokens lay side by side. Whitening is global, so call on the batch before it is split. No gradient
passes.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from objectives.numerics import bool_mask, masked, require_array
from objectives.types import Scalar


def token_rewards(
    *,
    scores: Float[Array, " B"],
    completion_mask: Bool[Array, "B T"],
    kl_penalty: Float[Array, "B T"] | None = None,
    kl_coef: Scalar = 0.0,
    step_rewards: Float[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """The reward of each token: a KL penalty on all of them, the score on the last.

    `r_t = -kl_coef * kl_t + step_t + [t is the last completion token] * score`

    Source: Ouyang et al. 2022 (InstructGPT), Eq. 2 and Appendix C.4; Ziegler et al. 2019, Eq. 2.

    Args:
      scores: `[B]`, reward units, paid on the EOS (on the last token of a truncated completion), never on a PAD. A row
        without a token is paid nothing.
      kl_penalty: `[B, T]`, nats, an estimate of KL(policy || ref) per token; `kl_estimate(..., "k1")` as published, for
        in a reward k1 is unbiased.
      kl_coef: reward units per nat. Raises ValueError where it lacks its `kl_penalty`.
      step_rewards: `[B, T]`, reward units, dense rewards, such as `q_t` of `prm_loss` at each step's last token (Wang
        et al. 2023, Math-Shepherd, Section 3.5).
    """
    require_array("kl_penalty", kl_penalty, "kl_coef", kl_coef)
    mask = bool_mask(completion_mask)
    chex.assert_shape(scores, (mask.shape[0],))
    rewards = jnp.where(last_token(mask), scores.astype(jnp.float32)[:, None], 0.0)
    if kl_penalty is not None:
        rewards = rewards - kl_coef * masked(kl_penalty, mask)
    if step_rewards is not None:
        rewards = rewards + masked(step_rewards, mask)
    return jax.lax.stop_gradient(rewards)


def gae(
    *,
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    completion_mask: Bool[Array, "B T"],
    gamma: Scalar,
    gae_lambda: Scalar,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantages, and the returns the value function is trained on.

    `delta_t = r_t + gamma V_{t+1} - V_t`; `A_t = delta_t + gamma lambda A_{t+1}`; `R_t = A_t + V_t`, where `t + 1` is
    the next completion token and V and A after the last one are 0.

    Source: Schulman et al. 2016 (GAE), Eq. 12 and 16; the returns are Schulman et al. 2017, Section 5.

    Args:
      rewards: `[B, T]`, reward units; see `token_rewards`.
      values: `[B, T]`, reward units; the slot of token y_t holds V of the state in which y_t was chosen.
      gamma: discount per token, in [0, 1].
      gae_lambda: in [0, 1]; 0 is the one-step error, 1 the discounted return minus the value.
    Returns advantages (not whitened; see `whiten`) and returns, both `[B, T]`.
    Differs from the paper: the horizon is the completion, so a truncated one is not bootstrapped: its last token is
    followed by value 0, like an EOS. Mask it out, or put the bootstrap in its reward.
    """
    mask = bool_mask(completion_mask)
    rewards = jax.lax.stop_gradient(masked(rewards, mask))
    values = jax.lax.stop_gradient(masked(values, mask))

    def backwards(after: tuple[Array, Array], slot: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        next_value, next_advantage = after
        reward, value, inside = slot
        advantage = reward + gamma * next_value - value + gamma * gae_lambda * next_advantage
        here = jnp.where(inside, value, next_value), jnp.where(inside, advantage, next_advantage)
        return here, jnp.where(inside, advantage, 0.0)

    # zeros made of `values`, so that they are sharded like it
    start = (jnp.zeros_like(values[:, 0]), jnp.zeros_like(values[:, 0]))
    _, advantages = jax.lax.scan(backwards, start, (rewards.T, values.T, mask.T), reverse=True)
    return advantages.T, advantages.T + values


def whiten(
    *, values: Float[Array, "B T"], mask: Bool[Array, "B T"], weights: Float[Array, " B"] | None = None
) -> Float[Array, "B T"]:
    """Values at mean 0 and variance 1 over all unmasked tokens of the global batch.

    `(x - mean) / sqrt(var + 1e-8)`, with `mean = sum_bt w_b m_bt x_bt / sum_bt w_b m_bt` and likewise `var`

    Source: Ziegler et al. 2019, Section 2.1 (rewards) and its released code (advantages).

    Equal values, of any unit, give exactly 0. A row of weight 0 counts as masked.
    Differs from TRL: the variance divides by the count n, not by n - 1, so that weights keep their meaning and one
    token is no special case: ours is TRL's times sqrt(n / (n - 1)).
    """
    mask = bool_mask(mask)
    token_weights = mask.astype(jnp.float32)
    if weights is not None:
        chex.assert_shape(weights, (mask.shape[0],))
        mask = mask & (weights > 0)[:, None]
        token_weights = jnp.where(mask, weights.astype(jnp.float32)[:, None], 0.0)
    count = jnp.maximum(token_weights.sum(), 1e-8)
    values = jax.lax.stop_gradient(masked(values, mask))

    # Relative to one of the values: the mean of equal floats then has no rounding error to be blown up.
    pivot = jnp.where(mask.any(), values.reshape(-1)[jnp.argmax(mask.reshape(-1))], 0.0)
    shifted = jnp.where(mask, values - pivot, 0.0)
    mean = (token_weights * shifted).sum() / count
    centered = jnp.where(mask, shifted - mean, 0.0)
    variance = (token_weights * jnp.square(centered)).sum() / count
    return centered * jax.lax.rsqrt(variance + 1e-8)


def explained_variance(
    *, returns: Scalar, returns_squared: Scalar, value_error: Scalar, value_error_squared: Scalar
) -> Float[Array, ""]:
    """How much of the returns' variance the value function explains: `1 - Var(R - V) / Var(R)`.

    Takes the means of the four metrics of that name of `ppo_value_loss`, which add up over micro-batches and devices as
    a mean of explained variances would not. The scalar is at most 1: 1 is perfect, 0 no better than a constant, below 0
    worse; 0 where the returns do not vary.
    """
    variance = jnp.asarray(returns_squared, jnp.float32) - jnp.square(jnp.asarray(returns, jnp.float32))
    unexplained = jnp.asarray(value_error_squared, jnp.float32) - jnp.square(value_error)
    varies = variance > 1e-6 * jnp.asarray(returns_squared, jnp.float32)  # above the rounding of the squares
    return jnp.where(varies, 1.0 - unexplained / jnp.where(varies, variance, 1.0), 0.0)


def last_token(mask: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """True on the last True of each row, nowhere in a row without one."""
    after = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
    return mask & (after == 1)
