"""DPO on one reasoning or action step, and the step's Q-value that it teaches."""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from objectives.dpo import dpo_loss
from objectives.numerics import masked
from objectives.reduce import sequence_sum
from objectives.types import ObjectiveOutput, Scalar


def step_dpo_loss(
    *,
    policy_chosen_token_logps: Float[Array, "B T"],
    policy_rejected_token_logps: Float[Array, "B S"],
    ref_chosen_token_logps: Float[Array, "B T"],
    ref_rejected_token_logps: Float[Array, "B S"],
    chosen_step_mask: Bool[Array, "B T"],
    rejected_step_mask: Bool[Array, "B S"],
    beta: Scalar,
    label_smoothing: Scalar = 0.0,
) -> ObjectiveOutput:
    """`dpo_loss` of the tokens of one step, chosen and rejected, after a history that both share.

    `x = sum_{t in step} (l_t - l_ref_t)`; `loss = -(1 - e) log sigmoid(b (x_c - x_r)) - e log sigmoid(-b (...))`

    Source: Lai et al. 2024 (Step-DPO); Zhai et al. 2024, "Enhancing Decision-Making for LLM Agents via Step-Level
    Q-Value Models", step-level preference loss.

    Args:
      policy_chosen_token_logps, ref_chosen_token_logps: `[B, T]`, of history and step; only the step counts.
      policy_rejected_token_logps, ref_rejected_token_logps: `[B, S]`, likewise; S may differ from T.
      chosen_step_mask, rejected_step_mask: True on the tokens of the step: neither the shared history, which would
        cancel, nor what follows.
      beta: b, inverse temperature, > 0.
      label_smoothing: e in [0, 0.5).
    Returns losses `[B]` and metrics as `dpo_loss`, over the step. A pair with an empty step has only one side: give it
    weight 0.
    """
    return dpo_loss(
        policy_chosen_logps=sequence_sum(policy_chosen_token_logps, chosen_step_mask),
        policy_rejected_logps=sequence_sum(policy_rejected_token_logps, rejected_step_mask),
        ref_chosen_logps=sequence_sum(ref_chosen_token_logps, chosen_step_mask),
        ref_rejected_logps=sequence_sum(ref_rejected_token_logps, rejected_step_mask),
        beta=beta,
        label_smoothing=label_smoothing,
    )


def step_q_values(
    *,
    policy_logps: Float[Array, "B T"],
    ref_logps: Float[Array, "B T"],
    step_ids: Int[Array, "B T"],
    num_steps: int,
    beta: Scalar,
) -> Float[Array, "B S"]:
    """The value that a step-DPO policy implicitly gives to each step, to choose between candidates.

    `Q(s, a) = b sum_{t in a} (l_t - l_ref_t)`

    Source: Zhai et al. 2024, "Enhancing Decision-Making for LLM Agents via Step-Level Q-Value Models"; the Q of a DPO
    policy, Rafailov et al. 2024, "From r to Q*".

    Args:
      policy_logps, ref_logps: `[B, T]`.
      step_ids: `[B, T]`, the step of each token, 1 to `num_steps`; 0, and any other number, is no step.
      num_steps: S, static.
      beta: b, the one the policy was trained with.
    Returns `[B, S]`, nats, without gradient; 0 for a step without tokens.
    """
    chex.assert_equal_shape([policy_logps, ref_logps, step_ids])
    steps = jnp.arange(1, num_steps + 1, dtype=step_ids.dtype)
    in_step = step_ids[:, :, None] == steps[None, None, :]
    is_used = in_step.any(2)
    log_ratio = masked(policy_logps, is_used) - masked(ref_logps, is_used)
    return jax.lax.stop_gradient(beta * jnp.where(in_step, log_ratio[:, :, None], 0.0).sum(1))
