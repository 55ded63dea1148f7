"""Next-token cross-entropy: pretraining, SFT and the update of rejection sampling."""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from objectives.numerics import bool_mask, masked, require_array
from objectives.types import ObjectiveOutput, Scalar


def next_token_loss(
    *,
    token_logps: Float[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    mean_logps: Float[Array, "B T"] | None = None,
    label_smoothing: Scalar = 0.0,
    logsumexp: Float[Array, "B T"] | None = None,
    z_loss_coef: Scalar = 0.0,
) -> ObjectiveOutput:
    """Negative log-likelihood of the next token, with optional label smoothing and z-loss.

    `loss_t = (1 - e) * -l_t + e * -mean_v log p_t(v) + c * (logsumexp_v z_t(v))^2`

    Source: label smoothing, Szegedy et al. 2016, Section 7 (uniform prior over the vocabulary); z-loss, Chowdhery
    et al. 2022 (PaLM), Section 5 (there c = 1e-4). Reduce with `token_mean`; per-sequence weights belong to the
    reduction.

    Args:
      token_logps: `l_t`, `[B, T]`, log-probs of the targets.
      mask: True on the tokens that are learned; None means all.
      mean_logps: `[B, T]`, mean over the vocabulary of the log-probs; needed by label smoothing.
      label_smoothing: e in [0, 1).
      logsumexp: `[B, T]`, log-normaliser of the logits, nats; needed by the z-loss.
      z_loss_coef: c >= 0.
    Returns losses `[B, T]` and the metrics `nll` `[B, T]`, the unsmoothed loss; `z_loss` `[B, T]` (if `logsumexp` is
    given), the term as it enters the loss; `frac_empty_rows` `[B]`, 1 for a row without a single target (its response
    was truncated away), which contributes nothing. Raises ValueError on a coefficient without the array it needs.
    """
    require_array("mean_logps", mean_logps, "label_smoothing", label_smoothing)
    require_array("logsumexp", logsumexp, "z_loss_coef", z_loss_coef)
    chex.assert_rank(token_logps, 2)
    mask = jnp.ones_like(token_logps, dtype=bool) if mask is None else bool_mask(mask)

    nll = -masked(token_logps, mask)
    losses = nll
    metrics = {"nll": nll, "frac_empty_rows": 1.0 - mask.any(axis=1).astype(jnp.float32)}
    if mean_logps is not None:
        losses = (1.0 - label_smoothing) * nll - label_smoothing * masked(mean_logps, mask)
    if logsumexp is not None:
        metrics["z_loss"] = z_loss_coef * jnp.square(masked(logsumexp, mask))
        losses = losses + metrics["z_loss"]
    return ObjectiveOutput(losses, jax.lax.stop_gradient(metrics))
