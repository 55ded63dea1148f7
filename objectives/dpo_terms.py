"""Parts that change what DPO contrasts or how much a pair weighs: divergences, lengths, weights, shifts."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from objectives.numerics import bool_mask, guarded_expm1, masked, refuse_unused
from objectives.pairs import float32_rows
from objectives.reduce import example_mean
from objectives.types import Scalar, WeightedSum, require_choice

FDivergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


def f_divergence_score(
    log_ratio: Float[Array, " B"], f_divergence: FDivergence, alpha_divergence_coef: Scalar | None = None
) -> Float[Array, " B"]:
    """The implicit reward over beta at `t = pi / pi_ref`, when DPO is regularised by an f-divergence.

    `g(x) = f'(t) - f'(1)`, `x = log t`
      reverse_kl: `x`; forward_kl: `1 - exp(-x)`; js: `log 2 + log sigmoid(x)`
      alpha: `(exp((a - 1) x) - 1) / (a - 1)`, which is `x` at a = 1

    Source: Wang et al. 2023, "Beyond Reverse KL", Theorem 1 and Table 1; alpha written with the derivative
    `(t^(a-1) - 1) / (a - 1)`, so that a = 1 is the reverse and a = 0 the forward KL.

    Args:
      log_ratio: `x`, `[B]`, nats, float32.
      alpha_divergence_coef: a; for alpha and only there.
    Returns `[B]`, 0 at x = 0. Raises ValueError on an unknown divergence, or where alpha and its coefficient do not
    come together.
    Differs from the paper: exponentials are continued by their tangent above 20 nats.
    """
    require_choice("f_divergence", f_divergence, FDivergence)
    if f_divergence == "alpha":
        if alpha_divergence_coef is None:
            raise ValueError("alpha_divergence_coef: got None, expected a number for f_divergence 'alpha'")
        order = jnp.asarray(alpha_divergence_coef, jnp.float32) - 1.0
        is_limit = jnp.abs(order) < 1e-6
        safe_order = jnp.where(is_limit, 1.0, order)
        return jnp.where(is_limit, log_ratio, guarded_expm1(safe_order * log_ratio) / safe_order)
    given = {"alpha_divergence_coef": alpha_divergence_coef is not None}
    refuse_unused(given, (), f"f_divergence {f_divergence!r}; only 'alpha' reads it")
    if f_divergence == "forward_kl":
        return -guarded_expm1(-log_ratio)
    if f_divergence == "js":
        return jnp.log(2.0) + jax.nn.log_sigmoid(log_ratio)
    return log_ratio


def length_desensitized_logps(
    *, token_logps: Float[Array, "B T"], mask: Bool[Array, "B T"], public_lengths: Int[Array, " B"], ld_alpha: Scalar
) -> Float[Array, " B"]:
    """Sequence log-probs in which what exceeds the pair's common length counts less.

    `sum_{t <= l_p} l_t + a * sum_{t > l_p} l_t`, t counting unmasked tokens, `l_p = min(|y_c|, |y_r|)`

    Source: Liu et al. 2024, "Length Desensitization in DPO" (LD-DPO). Pass the result to `dpo_loss`, of policy and
    reference alike.

    `token_logps` is `[B, T]`, `public_lengths` `l_p`, `[B]`, tokens, `ld_alpha` a in [0, 1], where 1 is the plain sum.
    """
    chex.assert_shape(public_lengths, (token_logps.shape[0],))
    mask = bool_mask(mask)
    position = jnp.cumsum(mask, axis=1)
    is_shared = position <= public_lengths[:, None]
    token_logps = masked(token_logps, mask)
    return jnp.where(is_shared, token_logps, ld_alpha * token_logps).sum(1)


def wpo_weights(
    *, token_logps: Float[Array, "B T"], log_collision: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, " B"]:
    """How likely the policy itself is to write this sequence; a pair weighs the product of its two.

    `w = exp(mean_t [l_t - log sum_v p(v | x, y_<t)^2])`

    Source: Zhou et al. 2024 (WPO), Eq. 2, aligned: relative to the policy's own expected probability, so that an
    on-policy sequence weighs about 1.

    `log_collision` is `log sum_v p_v^2`, `[B, T]`, nats, under the policy. Returns `[B]`, without gradient; 1 for an
    empty row. For `pair_weights`: `wpo_weights(chosen) * wpo_weights(rejected)`.

    Differs from the paper: not capped at 1.
    """
    mask = bool_mask(mask)
    aligned = masked(token_logps, mask) - masked(log_collision, mask)
    lengths = jnp.maximum(mask.sum(1), 1).astype(jnp.float32)
    return jax.lax.stop_gradient(jnp.exp(aligned.sum(1) / lengths))


def bco_delta_statistic(
    *,
    rewards_chosen: Float[Array, " B"],
    rewards_rejected: Float[Array, " B"],
    weights: Float[Array, " B"] | None = None,
) -> WeightedSum:
    """The batch's part of BCO's reward shift, `delta = (E[r_c] + E[r_r]) / 2`.

    Source: Jung et al. 2024, "Binary Classifier Optimization", reward shift.

    Rewards are the metrics of that name of `dpo_loss`, `[B]`, without gradient. Add the result, which counts (weighted)
    pairs, over micro-batches and devices, take `mean()`, and average that over steps: that is `bco_delta`.
    """
    chosen, rejected = float32_rows(rewards_chosen, rewards_rejected)
    return example_mean(jax.lax.stop_gradient(0.5 * (chosen + rejected)), weights)


def quantile_matched(
    values: Float[Array, " B"], targets: Float[Array, " B"], weights: Float[Array, " B"] | None = None
) -> Float[Array, " B"]:
    """For each value, the target of the same rank: the one-dimensional optimal transport plan.

    `out_b = targets_(k)` where `values_b = values_(k)`, the k-th smallest; ties by position.

    Source: Melnyk et al. 2024 (AOT): the plan sorts both sides.

    Of `values` `[B]` only the order is used; `targets` `[B]` carry the gradient. Rows of weight 0 take no rank, change
    no other row, and get 0; other weights do not move ranks.
    """
    is_real = jnp.ones(values.shape, bool) if weights is None else weights > 0
    rank = jnp.argsort(jnp.argsort(jax.lax.stop_gradient(jnp.where(is_real, values, jnp.inf))))
    order = jnp.argsort(jax.lax.stop_gradient(jnp.where(is_real, targets, jnp.inf)))
    return jnp.where(is_real, jnp.where(is_real, targets, 0.0)[order][rank], 0.0)
