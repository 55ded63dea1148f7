"""Policy-gradient surrogates on a ratio of probabilities: clipped, CISPO and SAPO.

Each takes the ratio `pi / pi_old` and the advantages (without gradient) in any one shape and returns losses of that
shape and its metrics; at ratio 1 each has the gradient of REINFORCE, `-A grad l`.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from objectives.types import Scalar, require_choice

RatioLevel = Literal["token", "sequence", "sequence_token"]


def clipped_surrogate(
    *,
    ratio: Float[Array, "..."],
    advantages: Float[Array, "..."],
    clip_eps_low: Scalar,
    clip_eps_high: Scalar,
    dual_clip: Scalar | None = None,
) -> tuple[Float[Array, "..."], dict[str, Array]]:
    """The pessimistic surrogate of PPO.

    `loss = -min(ratio * A, clip(ratio, 1 - eps_low, 1 + eps_high) * A)`, and with a dual clip c, where A < 0,
    `loss = -max(min(ratio * A, clip(ratio, 1 - eps_low, 1 + eps_high) * A), c * A)`

    Written as a selection: the ratio is replaced by its bound only if A > 0 and it is above, or A < 0 and it is below
    (or above the dual clip). The value is the same, and at the bound itself the gradient is that of the unclipped side
    (as in the sign table of the tests) instead of an average of both.

    Source: Schulman et al. 2017, Eq. 7; separate bounds, Yu et al. 2025 (DAPO), Eq. 10; dual clip, Ye et al. 2020
    (dual-clip PPO), Eq. 5, the "two-sided" clip of INTELLECT-2 (Prime Intellect 2025).

    Args:
      ratio: carries the gradient.
      clip_eps_low, clip_eps_high: >= 0.
      dual_clip: c > 1 + clip_eps_high, the bound of a ratio that grows although A < 0; None: no bound.
    Returns losses and metrics, 1.0 where the bound was active: `clip_fraction_low`, `clip_fraction_high`, with a dual
    clip `clip_fraction_dual`, and `clip_fraction`, any of them. Raises ValueError on a dual clip within the clip range.
    """
    chex.assert_equal_shape([ratio, advantages])
    require_above_clip("dual_clip", dual_clip, clip_eps_high)
    advantages = jax.lax.stop_gradient(advantages)
    low, high = 1.0 - clip_eps_low, 1.0 + clip_eps_high
    clipped_low = (advantages < 0) & (ratio < low)
    clipped_high = (advantages > 0) & (ratio > high)
    bounded = jnp.where(clipped_low, low, jnp.where(clipped_high, high, ratio))
    clipped = {"_low": clipped_low, "_high": clipped_high, "": clipped_low | clipped_high}
    if dual_clip is not None:
        clipped["_dual"] = (advantages < 0) & (ratio > dual_clip)
        clipped[""] |= clipped["_dual"]
        bounded = jnp.where(clipped["_dual"], dual_clip, bounded)
    return -bounded * advantages, {f"clip_fraction{name}": x.astype(jnp.float32) for name, x in clipped.items()}


def require_above_clip(name: str, bound: Scalar | None, clip_eps_high: Scalar) -> None:
    """Raises ValueError on a dual clip not above `1 + clip_eps_high`; traced numbers cannot be checked."""
    if not isinstance(bound, int | float) or not isinstance(clip_eps_high, int | float):
        return
    if bound <= 1.0 + clip_eps_high:
        raise ValueError(
            f"{name}: got {bound}, expected above 1 + clip_eps_high = {1.0 + clip_eps_high} because it bounds "
            "the ratios that the clip lets through"
        )


def cispo_surrogate(
    *, ratio: Float[Array, "..."], advantages: Float[Array, "..."], policy_logps: Float[Array, "..."], cap: Scalar
) -> tuple[Float[Array, "..."], dict[str, Array]]:
    """REINFORCE with a truncated importance weight: no token loses its gradient.

    `loss = -sg(min(ratio, cap)) * A * l`, `sg` the stop-gradient

    Source: Chen et al. 2025 (MiniMax-M1, CISPO), Eq. 4 and 5, without the lower bound, as there.

    The gradient passes through `policy_logps`, `l`, only. `cap` is `1 + eps_high` of the paper, > 0; below 1 it scales
    on-policy gradients down too. Returns losses and `cispo_clip_fraction`, 1.0 where the weight is capped.
    """
    chex.assert_equal_shape([ratio, advantages, policy_logps])
    losses = -jax.lax.stop_gradient(jnp.minimum(ratio, cap) * advantages) * policy_logps
    return losses, {"cispo_clip_fraction": (ratio > cap).astype(jnp.float32)}


def sapo_surrogate(
    *, ratio: Float[Array, "..."], advantages: Float[Array, "..."], temperature_pos: Scalar, temperature_neg: Scalar
) -> tuple[Float[Array, "..."], dict[str, Array]]:
    """A soft gate in place of the clip: the gradient fades as the ratio leaves 1, on either side.

    `loss = -(4 / tau) sigmoid(tau (ratio - 1)) * A`, `tau = tau_pos` where A > 0, else `tau_neg`

    Source: Gao et al. 2025 (SAPO), Eq. 5 and 6.

    The paper's temperatures, > 0, are `tau_pos` 1.0 and `tau_neg` 1.05: negative gradients fade sooner. Returns losses
    and `sapo_gate`, the gate's slope `4 s (1 - s)`: 1 at ratio 1, the factor on `ratio * A * grad l`.
    """
    chex.assert_equal_shape([ratio, advantages])
    advantages = jax.lax.stop_gradient(advantages)
    temperature = jnp.where(advantages > 0, temperature_pos, temperature_neg)
    gate = jax.nn.sigmoid(temperature * (ratio - 1.0))
    return -(4.0 / temperature) * gate * advantages, {"sapo_gate": 4.0 * gate * (1.0 - gate)}


def log_ratio_at(
    *, policy_logps: Float[Array, "B T"], old_logps: Float[Array, "B T"], mask: Bool[Array, "B T"], level: RatioLevel
) -> Float[Array, "B T"]:
    """The log of the ratio that each token's surrogate uses.

    By level, with `sg` the stop-gradient:
      token: `l_t - l_old_t`
      sequence: `log s = mean_t (l_t - l_old_t)`, on every token, with the gradient of the mean
      sequence_token: `sg(log s) + l_t - sg(l_t)`, the value of sequence with each token's own gradient

    Source: Zheng et al. 2025 (GSPO), Eq. 7 (sequence) and 14 (sequence_token).

    Log-probs must be 0 where masked, as the result then is. Raises ValueError on an unknown level.
    """
    require_choice("ratio_level", level, RatioLevel)
    log_ratio = policy_logps - jax.lax.stop_gradient(old_logps)
    if level == "token":
        return log_ratio
    lengths = jnp.maximum(mask.sum(axis=1, keepdims=True), 1).astype(jnp.float32)
    mean = jnp.where(mask, log_ratio.sum(axis=1, keepdims=True) / lengths, 0.0)
    if level == "sequence":
        return mean
    return jax.lax.stop_gradient(mean) + policy_logps - jax.lax.stop_gradient(policy_logps)
