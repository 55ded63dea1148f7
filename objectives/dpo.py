"""Direct preference optimisation on pairs of sequence log-probs."""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from objectives.types import ObjectiveOutput, Scalar


def dpo_loss(
    *,
    policy_chosen_logps: Float[Array, " B"],
    policy_rejected_logps: Float[Array, " B"],
    ref_chosen_logps: Float[Array, " B"],
    ref_rejected_logps: Float[Array, " B"],
    beta: Scalar,
    label_smoothing: Scalar = 0.0,
) -> ObjectiveOutput:
    """Sigmoid DPO, with the conservative label smoothing of cDPO.

    `D = (l_c - l_ref_c) - (l_r - l_ref_r)`; `loss = -(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D)`

    Source: Rafailov et al. 2023, Eq. 7; label smoothing, Mitchell 2023, "A note on DPO with noisy
    preferences".

    Args:
      policy_chosen_logps: `[B]`, nats, *summed* over the completion (a mean would change the effective beta).
      policy_rejected_logps: `[B]`, nats, likewise.
      ref_chosen_logps: `[B]`, nats, under the frozen reference. No gradient passes.
      ref_rejected_logps: `[B]`, nats, likewise.
      beta: inverse temperature, > 0; 0.1 is common.
      label_smoothing: e in [0, 0.5), the assumed probability that a label is flipped.

    Returns:
      losses `[B]`, one per pair, log 2 at policy = reference. Metrics, all `[B]`: `rewards_chosen`,
      `rewards_rejected` (`beta (l - l_ref)`), `reward_margin`, `reward_accuracy` (1 where the margin is
      positive; a tie is 0, so the first step reads 0), `logps_chosen`, `logps_rejected` (DPO may lower both).
    """
    logps = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chex.assert_rank(logps, 1)
    chex.assert_equal_shape(logps)
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = (x.astype(jnp.float32) for x in logps)

    log_ratio_chosen = policy_chosen - jax.lax.stop_gradient(ref_chosen)
    log_ratio_rejected = policy_rejected - jax.lax.stop_gradient(ref_rejected)
    # beta after the difference: XLA fuses `beta * c - beta * r` into a multiply-add, and a tie would not be 0
    margin = beta * (log_ratio_chosen - log_ratio_rejected)
    nll, flipped_nll = -jax.nn.log_sigmoid(margin), -jax.nn.log_sigmoid(-margin)
    losses = (1.0 - label_smoothing) * nll + label_smoothing * flipped_nll
    metrics = {
        "rewards_chosen": beta * log_ratio_chosen,
        "rewards_rejected": beta * log_ratio_rejected,
        "reward_margin": margin,
        "reward_accuracy": (margin > 0).astype(jnp.float32),
        "logps_chosen": policy_chosen,
        "logps_rejected": policy_rejected,
    }
    return ObjectiveOutput(losses, jax.lax.stop_gradient(metrics))
