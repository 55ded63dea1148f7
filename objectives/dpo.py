"""Direct preference optimisation on pairs of sequence log-probs: one contrast, many losses of it."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from objectives.dpo_terms import FDivergence, f_divergence_score, quantile_matched
from objectives.numerics import guarded_exp, is_literal_zero, refuse_unused
from objectives.pairs import float32_rows, mean_logps, pair_metrics, require_lengths, smoothed_nll
from objectives.types import ObjectiveOutput, Scalar, require_choice

# Losses of `D` alone, of each log-ratio on its own side of something, and of values of equal rank in the batch.
ContrastLoss = Literal["sigmoid", "sigmoid_norm", "hinge", "ipo", "ipo_unnormalized", "robust", "exo_pair", "discopop"]
TwoSidedLoss = Literal["nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"]
RankLoss = Literal["aot", "aot_unpaired"]
DPOLossType = Literal[ContrastLoss, TwoSidedLoss, RankLoss]

READ_BY: dict[str, tuple[str, ...]] = {
    "f_divergence": get_args(ContrastLoss),
    "label_smoothing": ("sigmoid", "sigmoid_norm", "robust", "exo_pair", *get_args(RankLoss)),
    "chosen_lengths": ("sigmoid_norm", "ipo"),
    "rejected_lengths": ("sigmoid_norm", "ipo"),
    "weights": get_args(RankLoss),
    "bco_delta": ("bco_pair",),
    "discopop_tau": ("discopop",),
}
"""The losses that read each option; given to another it is refused. `rpo_alpha` and `pair_weights` go with all."""


def dpo_loss(
    *,
    policy_chosen_logps: Float[Array, " B"],
    policy_rejected_logps: Float[Array, " B"],
    ref_chosen_logps: Float[Array, " B"],
    ref_rejected_logps: Float[Array, " B"],
    beta: Scalar,
    label_smoothing: Scalar = 0.0,
    loss_type: DPOLossType = "sigmoid",
    f_divergence: FDivergence = "reverse_kl",
    alpha_divergence_coef: Scalar | None = None,
    chosen_lengths: Float[Array, " B"] | None = None,
    rejected_lengths: Float[Array, " B"] | None = None,
    rpo_alpha: Scalar = 0.0,
    pair_weights: Float[Array, " B"] | None = None,
    weights: Float[Array, " B"] | None = None,
    bco_delta: Scalar | None = None,
    discopop_tau: Scalar | None = None,
) -> ObjectiveOutput:
    """A function of the contrast between the policy's and the reference's log-ratios of two completions.

    `loss = -log s(bD)` or another `loss_type`; `D = g(x_c) - g(x_r)`, `x = l - l_ref`, g the identity or another
    `f_divergence`, s the sigmoid:
      sigmoid: `-(1 - e) log s(bD) - e log s(-bD)`
      sigmoid_norm: the same of `D = g(x_c) / |c| - g(x_r) / |r|`
      hinge: `max(1 - bD, 0)`
      ipo: `(g(x_c) / |c| - g(x_r) / |r| - 1 / (2b))^2`; ipo_unnormalized: `(D - 1 / (2b))^2`
      robust: `[-(1 - e) log s(bD) + e log s(-bD)] / (1 - 2e)`
      exo_pair: `q log(q / (1 - e)) + (1 - q) log((1 - q) / e)`, `q = s(bD)`
      nca_pair: `-log s(b x_c) - [log s(-b x_c) + log s(-b x_r)] / 2`
      bco_pair: `-log s(b x_c - delta) - log s(-(b x_r - delta))`
      sppo_hard: `(x_c - 1 / (2b))^2 + (x_r + 1 / (2b))^2`
      aot: sigmoid of `D = u_(k) - v_(k)`, `u = l_c - l_r`, `v = l_ref_c - l_ref_r`, both sorted over the batch
      aot_unpaired: the same of the sorted `u = x_c`, `v = x_r`
      apo_zero: `1 - s(b x_c) + s(b x_r)`; apo_down: `s(b x_c) + 1 - s(b (x_c - x_r))`
      discopop: `(1 - q) (-log s(bD)) + q exp(-bD)`, `q = s(bD / tau)`
    and then `loss * pair_weight + rpo_alpha * (-l_c / |c|)`.

    Source: sigmoid, Rafailov et al. 2023, Eq. 7; label smoothing, Mitchell 2023, "A note on DPO with noisy
    preferences"; sigmoid_norm, Lambert et al. 2024 (Tulu 3); hinge, Liu et al. 2023 (RSO), Zhao et al. 2023 (SLiC-HF);
    ipo_unnormalized, Azar et al. 2023, Eq. 17, and ipo the same per token, as TRL; robust, Chowdhury et al. 2024
    (rDPO); exo_pair, Ji et al. 2024, Eq. 16; nca_pair, Chen et al. 2024 (NCA), with K = 2, weights 1 and 0; bco_pair,
    Jung et al. 2024; sppo_hard, Wu et al. 2024, Eq. 4.7 with P = 1 and 0; aot, Melnyk et al. 2024; apo, D'Oosterlinck
    et al. 2024, Eq. 7 and 8; discopop, Lu et al. 2024, Eq. 5; f_divergence, Wang et al. 2023; rpo, Pang et al. 2024,
    Eq. 1; pair weights, Zhou et al. 2024 (WPO), Eq. 2.

    aot and aot_unpaired are *batch-coupled*: a row's loss depends on the other rows, so micro-batches are not one
    batch, and rows that only pad must be named in `weights`.

    Args:
      policy_chosen_logps, policy_rejected_logps: `l_c`, `l_r`, `[B]` (means in place of sums would change the effective
        beta).
      ref_chosen_logps, ref_rejected_logps: `l_ref_c`, `l_ref_r`, `[B]`.
      beta: b, inverse temperature, > 0; 0.1 is common (the `tau` of IPO, `1 / eta` of SPPO; per token and so larger in
        sigmoid_norm).
      label_smoothing: e in [0, 0.5), the assumed probability that a label is flipped; in exo_pair in (0, 1).
      loss_type: see above; `READ_BY` names the options that it reads.
      f_divergence: see `f_divergence_score`; anything but reverse_kl only with a loss of D that is not aot.
      alpha_divergence_coef: a; with f_divergence alpha.
      chosen_lengths: `|c|`, `[B]`, tokens; with sigmoid_norm, ipo and `rpo_alpha`.
      rejected_lengths: `|r|`, `[B]`, tokens; with sigmoid_norm and ipo.
      rpo_alpha: coefficient of the auxiliary negative log-likelihood of the chosen, per token of each pair.
      pair_weights: `[B]`, factor of each pair's contrast (not of its NLL), as from `wpo_weights`. No gradient.
      weights: `[B]`, the row weights of the reduction; with aot and aot_unpaired, where rows of weight 0 take no rank.
        The losses are not multiplied by them.
      bco_delta: delta, nats, a mean of `bco_delta_statistic` over pairs; None means 0. With bco_pair.
      discopop_tau: temperature of the blend, > 0; None means 0.05. With discopop.
    Returns losses `[B]`, one per pair (aot: at the row whose u has the rank); sigmoid is log 2 at policy = reference.
    Metrics, all `[B]` and the same for every loss: `rewards_chosen`, `rewards_rejected` (`beta (l - l_ref)`, whatever
    the divergence, so arms compare), `reward_margin`, `reward_accuracy` (1 where the margin is positive; a tie is 0, so
    the first step reads 0), `logps_chosen`, `logps_rejected` (DPO may lower both).
    Raises ValueError on an unknown variant, an option that would have no effect (a traced scalar counts as given),
    missing lengths, or a label smoothing outside the range of robust or exo_pair.
    Differs from the paper: ipo is length-normalised as TRL does it and as its authors confirmed, the published form is
    ipo_unnormalized; aot of unequally weighted rows still gives every row one rank; exponentials are continued by their
    tangent above 20 nats. As published, discopop with a small tau is not monotone: its blend turns so fast that at a
    tie the loss *grows* with D. TRL's auxiliary NLL is one mean over the batch's chosen tokens,
    `-sum_b l_c / sum_b |c|`; the paper's and ours is `-mean_b (l_c / |c|)`; they agree at equal lengths.
    """
    require_choice("loss_type", loss_type, DPOLossType)
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    arrays = {**lengths, "weights": weights, "bco_delta": bco_delta, "discopop_tau": discopop_tau}
    given = {name: value is not None for name, value in arrays.items()}
    given |= {"label_smoothing": not is_literal_zero(label_smoothing), "f_divergence": f_divergence != "reverse_kl"}
    own = {option for option, losses in READ_BY.items() if loss_type in losses}
    has_nll = not is_literal_zero(rpo_alpha)
    used = own | ({"chosen_lengths"} if has_nll else set())
    refuse_unused(given, used, f"loss_type {loss_type!r}")
    require_lengths(lengths, used, f"{loss_type!r}" if "chosen_lengths" in own else "rpo_alpha")
    _check_label_smoothing(loss_type, label_smoothing)

    policy_chosen, policy_rejected, ref_chosen, ref_rejected = float32_rows(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    ref_chosen, ref_rejected = jax.lax.stop_gradient((ref_chosen, ref_rejected))
    log_ratio_chosen, log_ratio_rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected

    if loss_type in get_args(RankLoss):
        values, targets = log_ratio_chosen, log_ratio_rejected
        if loss_type == "aot":
            values, targets = policy_chosen - policy_rejected, ref_chosen - ref_rejected
        contrast = values - quantile_matched(values, targets, weights)
        if weights is not None:
            contrast = jnp.where(weights > 0, contrast, 0.0)
        losses = smoothed_nll(beta * contrast, label_smoothing)
    elif loss_type in get_args(TwoSidedLoss):
        losses = _two_sided_loss(loss_type, log_ratio_chosen, log_ratio_rejected, beta, bco_delta)
    else:
        scores_chosen = f_divergence_score(log_ratio_chosen, f_divergence, alpha_divergence_coef)
        scores_rejected = f_divergence_score(log_ratio_rejected, f_divergence, alpha_divergence_coef)
        if chosen_lengths is not None and rejected_lengths is not None:
            scores_chosen = mean_logps(scores_chosen, chosen_lengths)
            scores_rejected = mean_logps(scores_rejected, rejected_lengths)
        # beta after the difference: XLA fuses `beta * c - beta * r` into a multiply-add, and a tie would not be 0
        losses = _contrast_loss(loss_type, scores_chosen - scores_rejected, beta, label_smoothing, discopop_tau)

    if pair_weights is not None:
        losses = losses * jax.lax.stop_gradient(float32_rows(pair_weights, losses)[0])
    if has_nll:
        assert chosen_lengths is not None
        losses = losses - rpo_alpha * mean_logps(policy_chosen, chosen_lengths)
    metrics = pair_metrics(beta, log_ratio_chosen, log_ratio_rejected, policy_chosen, policy_rejected)
    return ObjectiveOutput(losses, jax.lax.stop_gradient(metrics))


def _contrast_loss(
    loss_type: DPOLossType, contrast: Array, beta: Scalar, label_smoothing: Scalar, tau: Scalar | None
) -> Array:
    margin = beta * contrast
    if loss_type in ("ipo", "ipo_unnormalized"):
        return jnp.square(contrast - 0.5 / beta)
    if loss_type == "hinge":
        return jax.nn.relu(1.0 - margin)
    if loss_type == "robust":
        kept = (1.0 - label_smoothing) * jax.nn.log_sigmoid(margin)
        return (label_smoothing * jax.nn.log_sigmoid(-margin) - kept) / (1.0 - 2.0 * label_smoothing)
    if loss_type == "exo_pair":
        keep_term = jax.nn.log_sigmoid(margin) - jnp.log1p(-label_smoothing)
        flip_term = jax.nn.log_sigmoid(-margin) - jnp.log(label_smoothing)
        return jax.nn.sigmoid(margin) * keep_term + jax.nn.sigmoid(-margin) * flip_term
    if loss_type == "discopop":
        blend = jax.nn.sigmoid(margin / (0.05 if tau is None else tau))
        return (1.0 - blend) * -jax.nn.log_sigmoid(margin) + blend * guarded_exp(-margin)
    return smoothed_nll(margin, label_smoothing)  # sigmoid, sigmoid_norm


def _two_sided_loss(
    loss_type: DPOLossType, chosen: Array, rejected: Array, beta: Scalar, bco_delta: Scalar | None
) -> Array:
    reward_chosen, reward_rejected = beta * chosen, beta * rejected
    if loss_type == "nca_pair":
        away = jax.nn.log_sigmoid(-reward_chosen) + jax.nn.log_sigmoid(-reward_rejected)
        return -jax.nn.log_sigmoid(reward_chosen) - 0.5 * away
    if loss_type == "bco_pair":
        delta = jax.lax.stop_gradient(0.0 if bco_delta is None else bco_delta)
        return -jax.nn.log_sigmoid(reward_chosen - delta) - jax.nn.log_sigmoid(delta - reward_rejected)
    if loss_type == "sppo_hard":
        return jnp.square(chosen - 0.5 / beta) + jnp.square(rejected + 0.5 / beta)
    if loss_type == "apo_zero":
        return jax.nn.sigmoid(-reward_chosen) + jax.nn.sigmoid(reward_rejected)
    return jax.nn.sigmoid(reward_chosen) + jax.nn.sigmoid(-beta * (chosen - rejected))  # apo_down


def _check_label_smoothing(loss_type: DPOLossType, label_smoothing: Scalar) -> None:
    """Only literals can be checked; of a traced one the range is the caller's duty."""
    if not isinstance(label_smoothing, int | float):
        return
    if loss_type == "robust" and not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing: got {label_smoothing}, expected in [0, 0.5) because 'robust' divides by 1 - 2e"
        )
    if loss_type == "exo_pair" and not 0 < label_smoothing < 1:
        raise ValueError(f"label_smoothing: got {label_smoothing}, expected in (0, 1) because 'exo_pair' takes log e")
