"""Simple preference optimisation: the length-normalised log-prob is the reward, without a reference."""

import jax
from jaxtyping import Array, Float

from objectives.pairs import mean_logps, pair_metrics, smoothed_nll
from objectives.types import ObjectiveOutput, Scalar


def simpo_loss(
    *,
    policy_chosen_logps: Float[Array, " B"],
    policy_rejected_logps: Float[Array, " B"],
    chosen_lengths: Float[Array, " B"],
    rejected_lengths: Float[Array, " B"],
    beta: Scalar,
    gamma: Scalar,
    label_smoothing: Scalar = 0.0,
) -> ObjectiveOutput:
    """Sigmoid contrast of mean log-probs with a target margin.

    `d = b l_c / |c| - b l_r / |r| - gamma`; `loss = -(1 - e) log sigmoid(d) - e log sigmoid(-d)`

    Source: Meng et al. 2024 (SimPO), Eq. 6.

    Args:
      policy_chosen_logps, policy_rejected_logps: `l_c`, `l_r`, `[B]`, sums; divided by the length here.
      chosen_lengths, rejected_lengths: `|c|`, `|r|`, `[B]`, tokens.
      beta: b > 0; 2 to 10, being per token.
      gamma: target margin of the rewards, >= 0 (TRL's `simpo_gamma`; the paper tunes `gamma / beta`).
      label_smoothing: e in [0, 0.5).
    Returns losses `[B]`, one per pair. Metrics as `dpo_loss`, with the reward `beta l / |y|`; `reward_margin` is before
    gamma, the log-probs are the sums.
    Differs from the paper: label smoothing, as TRL.
    """
    chosen = mean_logps(policy_chosen_logps, chosen_lengths)
    rejected = mean_logps(policy_rejected_logps, rejected_lengths)
    metrics = pair_metrics(beta, chosen, rejected, policy_chosen_logps, policy_rejected_logps)
    losses = smoothed_nll(metrics["reward_margin"] - gamma, label_smoothing)
    return ObjectiveOutput(losses, jax.lax.stop_gradient(metrics))
