"""PPO on completions: clipped policy loss, clipped value loss and the adaptive KL coefficient."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from objectives.kl import LossKLEstimator, kl_estimate, require_loss_estimator
from objectives.numerics import bool_mask, guarded_exp, masked, require_array
from objectives.surrogate import clipped_surrogate
from objectives.types import ObjectiveOutput, Scalar


def ppo_policy_loss(
    *,
    policy_logps: Float[Array, "B T"],
    old_logps: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    completion_mask: Bool[Array, "B T"],
    clip_eps_low: Scalar = 0.2,
    clip_eps_high: Scalar = 0.2,
    dual_clip: Scalar | None = None,
    entropy: Float[Array, "B T"] | None = None,
    entropy_coef: Scalar = 0.0,
    ref_logps: Float[Array, "B T"] | None = None,
    kl_coef: Scalar = 0.0,
    kl_estimator: LossKLEstimator = "k3",
) -> ObjectiveOutput:
    """Token-level clipped surrogate, minus an entropy bonus, plus a KL penalty if it is not in the reward.

    `loss_t = -min(ratio_t A_t, clip(ratio_t, 1 - eps_low, 1 + eps_high) A_t) - c_H H_t + c_kl k_t`,
    `ratio_t = exp(l_t - l_old_t)`

    Source: Schulman et al. 2017, Eq. 7 and 9; dual clip, Ye et al. 2020, Eq. 5 (see `clipped_surrogate`); on language,
    Ouyang et al. 2022, Eq. 2.

    Args:
      policy_logps, old_logps: `l`, `l_old`, `[B, T]`, of the sampled tokens.
      advantages: `[B, T]`, whitened over the global batch (`gae`, `whiten`).
      clip_eps_low, clip_eps_high: clip distances, >= 0.
      dual_clip: bound of the ratio where the advantage is negative, > 1 + clip_eps_high; 3 is common. None: no bound.
      entropy: `H`, `[B, T]`, nats, of the policy's distribution at each token; carries the gradient. None: no bonus.
      entropy_coef: `c_H` >= 0; 0 with `entropy` only measures it.
      ref_logps: `l_ref`, `[B, T]`. None: no KL in the loss.
      kl_coef: `c_kl` >= 0; 0 with `ref_logps` only measures the KL, as when it is paid in the reward.
      kl_estimator: k3, or k2, whose gradient is that of KL(policy || ref); see `kl_estimate`.
    Returns losses `[B, T]` and metrics `[B, T]`: `log_ratio` (before clipping), `ratio`, `approx_kl` (k3 of KL(old ||
    policy)), those of `clipped_surrogate`, `entropy` and `kl_ref` (k3 of KL(policy || ref)) where their arrays are
    given.
    Raises ValueError on `kl_estimator` other than k2 or k3, `kl_coef` without `ref_logps`, `entropy_coef` without
    `entropy`, or `dual_clip` within the clip range.
    Differs from the paper: the value loss is separate (`ppo_value_loss`); ratio and k3 continue linearly beyond 20
    nats.
    """
    require_loss_estimator(kl_estimator)
    require_array("ref_logps", ref_logps, "kl_coef", kl_coef)
    require_array("entropy", entropy, "entropy_coef", entropy_coef)

    mask = bool_mask(completion_mask)
    policy_logps = masked(policy_logps, mask)
    old_logps = jax.lax.stop_gradient(masked(old_logps, mask))
    log_ratio = policy_logps - old_logps
    ratio = guarded_exp(log_ratio)
    losses, metrics = clipped_surrogate(
        ratio=ratio,
        advantages=masked(advantages, mask),
        clip_eps_low=clip_eps_low,
        clip_eps_high=clip_eps_high,
        dual_clip=dual_clip,
    )
    metrics |= {"log_ratio": log_ratio, "ratio": ratio, "approx_kl": kl_estimate(old_logps, policy_logps, "k3")}
    if entropy is not None:
        metrics["entropy"] = masked(entropy, mask)
        losses = losses - entropy_coef * metrics["entropy"]
    if ref_logps is not None:
        ref_logps = masked(ref_logps, mask)
        losses = losses + kl_coef * kl_estimate(policy_logps, ref_logps, kl_estimator)
        metrics["kl_ref"] = kl_estimate(policy_logps, ref_logps, "k3")
    return ObjectiveOutput(losses, jax.lax.stop_gradient(metrics))


def ppo_value_loss(
    *,
    values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    completion_mask: Bool[Array, "B T"],
    old_values: Float[Array, "B T"] | None,
    clip_eps_value: Scalar | None,
) -> ObjectiveOutput:
    """Squared error to the returns, of the worse of the value and the value clipped around the old one.

    `loss_t = 0.5 max((V_t - R_t)^2, (clip(V_t, V_old_t - eps_v, V_old_t + eps_v) - R_t)^2)`

    Source: the released code of Schulman et al. 2017 (openai/baselines, ppo2); unclipped it is half of `L^VF` of their
    Eq. 9.

    Args (`[B, T]`, reward units):
      values: `V`; carries the gradient.
      returns: `R`, from `gae`, never whitened.
      old_values: `V_old`, the values that `gae` saw. None: no clip.
      clip_eps_value: eps_v > 0: its meaning depends on the scale of the rewards. None: no clip.
    Returns losses `[B, T]`, squared reward units, and metrics `[B, T]`: `value_clip_fraction`, 1 where the clip removed
    the gradient; `values`; `returns`, `returns_squared`, `value_error` (`R - V`) and `value_error_squared`, whose means
    `explained_variance` takes. Raises ValueError on one of `old_values` and `clip_eps_value` without the other.
    """
    if (old_values is None) != (clip_eps_value is None):
        given, missing = ("clip_eps_value", "old_values") if old_values is None else ("old_values", "clip_eps_value")
        raise ValueError(f"{given}: given, but it would have no effect because {missing} is None; pass both or none")
    mask = bool_mask(completion_mask)
    values = masked(values, mask)
    returns = jax.lax.stop_gradient(masked(returns, mask))
    errors = jnp.square(values - returns)
    clipped = jnp.zeros_like(mask)
    if old_values is not None and clip_eps_value is not None:
        old_values = jax.lax.stop_gradient(masked(old_values, mask))
        moved = values - old_values
        bound = old_values + jnp.sign(jax.lax.stop_gradient(moved)) * clip_eps_value
        clipped_errors = jnp.square(bound - returns)
        # A selection, as in `clipped_surrogate`: no averaged gradient at the bound.
        clipped = (jnp.abs(moved) > clip_eps_value) & (clipped_errors > errors)
        errors = jnp.where(clipped, clipped_errors, errors)
    metrics = {
        "value_clip_fraction": clipped.astype(jnp.float32),
        "values": values,
        "returns": returns,
        "returns_squared": jnp.square(returns),
        "value_error": returns - values,
        "value_error_squared": jnp.square(returns - values),
    }
    return ObjectiveOutput(0.5 * errors, jax.lax.stop_gradient(metrics))


def adaptive_kl_coef(
    *, kl_coef: Scalar, observed_kl: Scalar, target_kl: Scalar, horizon: Scalar, batch_size: Scalar
) -> Float[Array, ""]:
    """The KL coefficient after a batch: raised where the KL was above its target, lowered where below.

    `kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * batch_size / horizon)`

    Source: Ziegler et al. 2019, Section 2.2 (unnumbered equation of the log-space proportional controller).

    Args:
      kl_coef: the coefficient in force, reward units per nat, > 0.
      observed_kl, target_kl: nats per completion; the mean over the batch of `sum_t kl_t`, and a number > 0.
      horizon: completions over which the largest error that counts, 20%, multiplies the coefficient by e^0.2.
      batch_size: completions in the batch.
    Differs from the paper: its gain K_beta = 0.1 is `batch_size / horizon`, as in its released code.
    """
    observed, target = jnp.asarray(observed_kl, jnp.float32), jnp.asarray(target_kl, jnp.float32)
    error = jnp.clip(observed / target - 1.0, -0.2, 0.2)
    return jax.lax.stop_gradient(jnp.asarray(kl_coef, jnp.float32) * (1.0 + error * batch_size / horizon))
