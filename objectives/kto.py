"""Kahneman-Tversky optimisation: single completions, each labelled desirable or undesirable."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from objectives.numerics import bool_mask, is_literal_zero, refuse_unused
from objectives.pairs import float32_rows
from objectives.reduce import example_mean
from objectives.types import ObjectiveOutput, Scalar, Subset, require_choice

KTOLossType = Literal["kto", "apo_zero_unpaired"]


def kto_reference_point(
    *, policy_kl_logps: Float[Array, " B"], ref_kl_logps: Float[Array, " B"], weights: Float[Array, " B"] | None = None
) -> Float[Array, ""]:
    """What a completion's log-ratio is compared with: an estimate of `KL(policy || ref)`.

    `z = max(0, mean_b (l - l_ref))`, over prompts each with the completion of *another* prompt

    Source: Ethayarajh et al. 2024 (KTO).

    Args:
      policy_kl_logps, ref_kl_logps: `[B]`, summed over the mismatched completion. No gradient passes.
      weights: `[B]`, of the rows.
    Returns z, scalar, nats, >= 0; 0 where nothing counts. Give it the *global* batch: the mean is inside the loss, so
    micro-batches share one z or they are not one batch.
    """
    policy, ref = float32_rows(policy_kl_logps, ref_kl_logps)
    return jax.lax.stop_gradient(jax.nn.relu(example_mean(policy - ref, weights).mean()))


def kto_loss(
    *,
    policy_logps: Float[Array, " B"],
    ref_logps: Float[Array, " B"],
    desirable: Bool[Array, " B"],
    reference_point: Scalar | Float[Array, " B"],
    beta: Scalar,
    desirable_weight: Scalar = 1.0,
    undesirable_weight: Scalar = 1.0,
    loss_type: KTOLossType = "kto",
) -> ObjectiveOutput:
    """Saturating loss of a gain over the reference point, for desirable and undesirable completions apart.

    `x = l - l_ref`; desirable `lD (1 - sigmoid(b (x - z)))`, undesirable `lU (1 - sigmoid(b (z - x)))`
      kto: `z` of `kto_reference_point`; apo_zero_unpaired: `z = 0`

    Source: Ethayarajh et al. 2024 (KTO), Eq. 7; apo_zero_unpaired, D'Oosterlinck et al. 2024, Eq. 7.

    Args:
      policy_logps, ref_logps: `l`, `l_ref`, `[B]`, summed over the completion.
      desirable: `[B]`, bool.
      reference_point: z, nats, from `kto_reference_point`, scalar or `[B]`, without gradient; with apo_zero_unpaired a
        literal 0.
      beta: b > 0, inverse temperature; 0.1 is common.
      desirable_weight, undesirable_weight: lD, lU > 0; the paper balances `lD * #desirable` against
        `lU * #undesirable`.
    Returns losses `[B]`, half the weight at x = z. Metrics: `rewards` (`beta x`), `logps` and `kl` (z), `[B]`; over the
    rows of each label, as `Subset`s, `rewards_`, `logps_` and `accuracy_` (1 where x is on the right side of z) with
    `desirable` and `undesirable`. There is no pair, so the margin is the difference of the two reduced rewards.
    Raises ValueError on an unknown loss_type, or a reference point given to apo_zero_unpaired.
    Differs from the paper: apo_zero_unpaired. The weights enter the losses, not the denominator (as TRL).
    """
    require_choice("loss_type", loss_type, KTOLossType)
    if loss_type == "apo_zero_unpaired":
        refuse_unused({"reference_point": not is_literal_zero(reference_point)}, (), f"loss_type {loss_type!r}; pass 0")
    policy, ref = float32_rows(policy_logps, ref_logps)
    chex.assert_equal_shape([policy, desirable])
    desirable = bool_mask(desirable)
    point = jax.lax.stop_gradient(jnp.broadcast_to(jnp.asarray(reference_point, jnp.float32), policy.shape))

    log_ratio = policy - jax.lax.stop_gradient(ref)
    gain = jnp.where(desirable, log_ratio - point, point - log_ratio)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight).astype(jnp.float32)
    losses = weight * jax.nn.sigmoid(-beta * gain)

    rows = {"rewards": beta * log_ratio, "logps": policy, "accuracy": (gain > 0).astype(jnp.float32)}
    labels = {"desirable": desirable.astype(jnp.float32), "undesirable": 1.0 - desirable.astype(jnp.float32)}
    metrics: dict[str, Array | Subset] = {"rewards": rows["rewards"], "logps": policy, "kl": point}
    metrics |= {f"{name}_{label}": Subset(x, where) for name, x in rows.items() for label, where in labels.items()}
    return ObjectiveOutput(losses, jax.lax.stop_gradient(metrics))
