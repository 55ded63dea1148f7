"""GRPO and its family: policy gradient with group-relative advantages and a KL penalty in the loss."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from objectives.kl import LossKLEstimator, kl_estimate, require_loss_estimator
from objectives.numerics import bool_mask, guarded_exp, masked, require_array
from objectives.surrogate import (
    RatioLevel,
    cispo_surrogate,
    clipped_surrogate,
    log_ratio_at,
    require_above_clip,
    sapo_surrogate,
)
from objectives.types import ObjectiveOutput, Scalar, require_choice

SurrogateName = Literal["clip", "cispo", "sapo"]
KLCorrection = Literal["none", "ratio"]


def grpo_loss(
    *,
    policy_logps: Float[Array, "B T"],
    old_logps: Float[Array, "B T"],
    advantages: Float[Array, " B"] | Float[Array, "B T"],
    completion_mask: Bool[Array, "B T"],
    clip_eps_low: Scalar = 0.2,
    clip_eps_high: Scalar = 0.2,
    ref_logps: Float[Array, "B T"] | None = None,
    beta: Scalar = 0.0,
    kl_estimator: LossKLEstimator = "k3",
    ratio_level: RatioLevel = "token",
    surrogate: SurrogateName = "clip",
    delta: Scalar | None = None,
    cispo_clip: Scalar | None = None,
    sapo_temperature_pos: Scalar | None = None,
    sapo_temperature_neg: Scalar | None = None,
    kl_correction: KLCorrection = "none",
    importance_weights: Float[Array, " B"] | Float[Array, "B T"] | None = None,
) -> ObjectiveOutput:
    """Surrogate of the policy gradient plus `beta` times a KL estimate to the reference.

    `loss_t = -w_t min(ratio_t A_t, clip(ratio_t, 1 - eps_low, 1 + eps_high) A_t) + beta * k_t`,
    `ratio_t = exp(l_t - l_old_t)`, `w_t = 1` without importance weights

    By kl_correction, the last term is: none `beta * k_t`; ratio `beta * ratio_t * k_t`.

    Source: Shao et al. 2024 (DeepSeekMath), Eq. 3 and 4. The caller picks the member of the family:
      GRPO: `group_advantages` as it is, reduced by `sequence_mean`.
      Dr. GRPO: `group_advantages(normalization="none")`, reduced by `constant`, beta 0.
      DAPO: `clip_eps_high=0.28`, reduced by `token_mean`, beta 0; its sampling and penalty are elsewhere.
      Clipped RLOO: `group_advantages(baseline="leave_one_out", normalization="none")`, reduced by `constant`.
      GSPO (Zheng et al. 2025, Eq. 5 and 7): `ratio_level="sequence"`, `ratio = exp(mean_t (l_t - l_old_t))`, clip 3e-4
        / 4e-4, `sequence_mean`, beta 0. With advantages per token, GSPO-token (Eq. 13 and 14):
        `ratio_level="sequence_token"`, same value, each token the gradient of its own log-prob.
      CISPO (Chen et al. 2025, Eq. 4 and 5): `surrogate="cispo"`, `-sg(min(ratio, cispo_clip)) A l`, `token_mean`.
      SAPO (Gao et al. 2025, Eq. 5 and 6): `surrogate="sapo"`, `-(4 / tau) sigmoid(tau (ratio - 1)) A`, `sequence_mean`.
      REINFORCE++ (Hu et al. 2025): `reinforce_pp_advantages`, `token_mean`.
      Process supervision: `process_advantages`, `sequence_mean`.

    Args:
      policy_logps, old_logps: `l`, `l_old`, `[B, T]`, of the sampled tokens.
      advantages: one per sequence or one per token.
      clip_eps_low, clip_eps_high: clip distances, >= 0; a larger upper one is "clip-higher". `clip` only.
      ref_logps: `l_ref`, `[B, T]`. None: no KL term.
      beta: KL coefficient; 0 with `ref_logps` only measures the KL.
      kl_estimator: k3 as published, or k2, whose gradient is that of KL(policy || ref); see `kl_estimate`.
      ratio_level: where the ratio is taken; see `surrogate.log_ratio_at`.
      surrogate: see `clipped_surrogate`, `cispo_surrogate`, `sapo_surrogate`.
      delta: two-sided clip, the bound of the ratio where A < 0, > 1 + clip_eps_high (INTELLECT-2; the dual clip of Ye
        et al. 2020). None: no bound. `clip` only.
      cispo_clip: largest importance weight, `1 + eps_high` of the paper. `cispo` only.
      sapo_temperature_pos, sapo_temperature_neg: tau where A > 0 and elsewhere; the paper's are 1.0 and 1.05. `sapo`
        only.
      kl_correction: `ratio` multiplies k3 by the token's `exp(l - l_old)`, gradient included: the gradient is then that
        of KL(policy || ref) for tokens sampled from the old policy (DeepSeek-AI 2025, DeepSeek-V3.2, Eq. 7).
      importance_weights: `w`, one per sequence or per token, without gradient, multiplies the surrogate, not the KL
        term; see `importance.importance_weights`. None: 1.
    Returns losses `[B, T]` and metrics `[B, T]`: `log_ratio` (per token, before clipping), `ratio` (at the ratio
    level), `approx_kl` (k3 of KL(old || policy)), those of the surrogate, `importance_weight` if given, and with
    `ref_logps` `kl_ref` (k3 of KL(policy || ref) whichever estimator is in the loss, so arms compare). The first
    on-policy step has losses that sum to about 0 with a gradient that is not: log the gradient norm.
    Raises ValueError on `kl_estimator` other than k2 or k3; `beta` or `kl_correction` without `ref_logps`;
    `kl_correction` with k2; an unknown literal; an argument that the surrogate does not read, or one that it needs and
    is None; `delta` within the clip range; advantages per token with one gradient per sequence (`ratio_level`
    "sequence", except with `cispo`), which would only see their mean; "sequence_token" with `cispo`, which is
    "sequence".
    Differs from the paper: two clip bounds (the paper's one epsilon is both); ratio and k3 continue linearly beyond 20
    nats; the corrected KL takes the token's ratio at every ratio level.
    """
    require_loss_estimator(kl_estimator)
    require_array("ref_logps", ref_logps, "beta", beta)
    _require_family(
        surrogate,
        delta=("clip", delta),
        cispo_clip=("cispo", cispo_clip),
        sapo_temperature_pos=("sapo", sapo_temperature_pos),
        sapo_temperature_neg=("sapo", sapo_temperature_neg),
    )
    require_choice("kl_correction", kl_correction, KLCorrection)
    _require_level(ratio_level, surrogate, advantages)
    if kl_correction == "ratio" and ref_logps is None:
        raise ValueError("kl_correction: given, but it would have no effect because ref_logps is None")
    if kl_correction == "ratio" and kl_estimator != "k3":
        raise ValueError(
            f"kl_correction: got 'ratio' with kl_estimator {kl_estimator!r}, expected k3 because only a value "
            "that is unbiased under the policy can be re-weighted into the gradient of the KL"
        )
    require_above_clip("delta", delta, clip_eps_high)

    mask = bool_mask(completion_mask)
    policy_logps = masked(policy_logps, mask)
    old_logps = jax.lax.stop_gradient(masked(old_logps, mask))
    advantages = jax.lax.stop_gradient(_per_token("advantages", advantages, mask))
    log_ratio = policy_logps - old_logps
    ratio = guarded_exp(log_ratio_at(policy_logps=policy_logps, old_logps=old_logps, mask=mask, level=ratio_level))
    if surrogate == "clip":
        losses, metrics = clipped_surrogate(
            ratio=ratio, advantages=advantages, clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high, dual_clip=delta
        )
    elif surrogate == "cispo":
        assert cispo_clip is not None
        losses, metrics = cispo_surrogate(ratio=ratio, advantages=advantages, policy_logps=policy_logps, cap=cispo_clip)
    else:
        assert sapo_temperature_pos is not None and sapo_temperature_neg is not None
        temperatures = {"temperature_pos": sapo_temperature_pos, "temperature_neg": sapo_temperature_neg}
        losses, metrics = sapo_surrogate(ratio=ratio, advantages=advantages, **temperatures)
    metrics |= {"log_ratio": log_ratio, "ratio": ratio, "approx_kl": kl_estimate(old_logps, policy_logps, "k3")}
    if importance_weights is not None:
        metrics["importance_weight"] = _per_token("importance_weights", importance_weights, mask)
        losses = losses * jax.lax.stop_gradient(metrics["importance_weight"])
    if ref_logps is not None:
        ref_logps = masked(ref_logps, mask)
        penalty = kl_estimate(policy_logps, ref_logps, kl_estimator)
        losses = losses + beta * (penalty * guarded_exp(log_ratio) if kl_correction == "ratio" else penalty)
        metrics["kl_ref"] = kl_estimate(policy_logps, ref_logps, "k3")
    return ObjectiveOutput(losses, jax.lax.stop_gradient(metrics))


def _per_token(name: str, values: Array, mask: Array) -> Array:
    if values.ndim == 1:
        chex.assert_shape(values, (mask.shape[0],))
        values = jnp.broadcast_to(values[:, None], mask.shape)
    elif values.shape != mask.shape:
        raise ValueError(f"{name}: got shape {values.shape}, expected {mask.shape} or {mask.shape[:1]}")
    return masked(values, mask)


def _require_family(surrogate: str, **owned: tuple[str, Scalar | None]) -> None:
    """Every None-able argument goes with one surrogate: refused with another, needed (but delta) with its own."""
    require_choice("surrogate", surrogate, SurrogateName)
    for name, (owner, value) in owned.items():
        if value is not None and owner != surrogate:
            raise ValueError(
                f"{name}: given, but it would have no effect because surrogate is {surrogate!r}, not {owner!r}"
            )
        if value is None and owner == surrogate and name != "delta":
            raise ValueError(f"{name}: got None, expected a number because surrogate is {surrogate!r}")


def _require_level(ratio_level: str, surrogate: str, advantages: Array) -> None:
    if ratio_level == "sequence" and advantages.ndim == 2 and surrogate != "cispo":
        raise ValueError(
            "advantages: got one per token, expected one per sequence because with ratio_level 'sequence' all "
            "tokens of a sequence share one gradient, which sees only their mean; use 'sequence_token'"
        )
    if ratio_level == "sequence_token" and surrogate == "cispo":
        raise ValueError(
            "ratio_level: got 'sequence_token', expected 'sequence' because cispo passes no gradient through "
            "the ratio, so the two are the same"
        )
