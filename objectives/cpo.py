"""Contrastive preference optimisation: DPO with a uniform reference, plus likelihood of the chosen."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from objectives.numerics import is_literal_zero, refuse_unused
from objectives.pairs import float32_rows, mean_logps, pair_metrics, require_lengths, smoothed_nll
from objectives.types import ObjectiveOutput, Scalar, require_choice

CPOLossType = Literal["sigmoid", "hinge", "ipo"]


def cpo_loss(
    *,
    policy_chosen_logps: Float[Array, " B"],
    policy_rejected_logps: Float[Array, " B"],
    beta: Scalar,
    nll_coef: Scalar = 1.0,
    chosen_lengths: Float[Array, " B"] | None = None,
    rejected_lengths: Float[Array, " B"] | None = None,
    label_smoothing: Scalar = 0.0,
    loss_type: CPOLossType = "sigmoid",
) -> ObjectiveOutput:
    """Reference-free contrast plus the chosen's negative log-likelihood.

    `D = l_c - l_r`; `loss = contrast + nll_coef * (-l_c / |c|)`, with the contrast
      sigmoid: `-(1 - e) log sigmoid(bD) - e log sigmoid(-bD)`
      hinge: `max(1 - bD, 0)`
      ipo: `(l_c / |c| - l_r / |r| - 1 / (2b))^2`

    Source: Xu et al. 2024 (CPO), Eq. 3, plus its behaviour-cloning term; hinge and ipo as in `dpo_loss`.

    Args:
      policy_chosen_logps, policy_rejected_logps: `l_c`, `l_r`, `[B]`.
      beta: b > 0; 0.1 is common.
      nll_coef: weight of the likelihood, >= 0; 1 as published (TRL's `cpo_alpha`).
      chosen_lengths: `|c|`, `[B]`, tokens; with `nll_coef` and ipo.
      rejected_lengths: `|r|`, `[B]`, tokens; with ipo.
      label_smoothing: e in [0, 0.5); with sigmoid.
    Returns losses `[B]`, one per pair. Metrics as `dpo_loss`, with the reward `beta l` (ipo: `beta l / |y|`), and
    `nll_chosen` (`-l_c / |c|`) if `nll_coef` is given.
    Raises ValueError on an unknown loss_type, an option that would have no effect, or missing lengths.
    Differs from the paper: its NLL is the sum over the sequence, `-mean_b l_c`; TRL's is one mean over the chosen
    tokens of the batch, `-sum_b l_c / sum_b |c|`; ours is `-mean_b (l_c / |c|)`, so that a pair counts the same
    whatever its length.
    """
    require_choice("loss_type", loss_type, CPOLossType)
    has_nll, is_ipo = not is_literal_zero(nll_coef), loss_type == "ipo"
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    given = {name: array is not None for name, array in lengths.items()}
    given["label_smoothing"] = not is_literal_zero(label_smoothing)
    reads = {"chosen_lengths": has_nll or is_ipo, "rejected_lengths": is_ipo, "label_smoothing": loss_type == "sigmoid"}
    used = [name for name, is_read in reads.items() if is_read]
    refuse_unused(given, used, f"loss_type {loss_type!r}" + ("" if has_nll else " and nll_coef 0"))
    require_lengths(lengths, used, "'ipo'" if is_ipo else "nll_coef")

    sums = float32_rows(policy_chosen_logps, policy_rejected_logps)
    chosen, rejected = sums
    if is_ipo:
        assert chosen_lengths is not None and rejected_lengths is not None
        chosen, rejected = mean_logps(chosen, chosen_lengths), mean_logps(rejected, rejected_lengths)
    metrics = pair_metrics(beta, chosen, rejected, *sums)
    if is_ipo:
        losses = jnp.square(chosen - rejected - 0.5 / beta)
    elif loss_type == "hinge":
        losses = jax.nn.relu(1.0 - metrics["reward_margin"])
    else:
        losses = smoothed_nll(metrics["reward_margin"], label_smoothing)
    if has_nll:
        assert chosen_lengths is not None
        metrics["nll_chosen"] = -mean_logps(sums[0], chosen_lengths)
        losses = losses + nll_coef * metrics["nll_chosen"]
    return ObjectiveOutput(losses, jax.lax.stop_gradient(metrics))
