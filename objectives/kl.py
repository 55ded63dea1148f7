"""Single-sample estimators of KL(policy || reference)."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from objectives.numerics import guarded_expm1
from objectives.types import require_choice

KLEstimator = Literal["k1", "k2", "k3"]
LossKLEstimator = Literal["k2", "k3"]


def require_loss_estimator(kl_estimator: str) -> None:
    """Raises ValueError on an estimator that teaches nothing as a loss; see `kl_estimate`."""
    if kl_estimator not in get_args(LossKLEstimator):
        raise ValueError(
            f"kl_estimator: got {kl_estimator!r}, expected k2 or k3 because k1 belongs in the reward: as a "
            "loss its expected gradient is zero (E[grad log pi] = 0), noise with no pull to the reference"
        )


def kl_estimate(
    policy_logps: Float[Array, "..."], ref_logps: Float[Array, "..."], estimator: KLEstimator
) -> Float[Array, "..."]:
    """Estimate `KL(policy || ref)` at each sampled token from the two log-probs of that token.

    With `d = l - l_ref`: `k1 = d`, `k2 = d^2 / 2`, `k3 = exp(-d) - 1 + d`.

    Source: Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html); k3 is Eq. 4 of Shao
    et al. 2024 (DeepSeekMath).

    What each is good for, when tokens are sampled from the policy (tests/objectives/test_kl.py proves each line):
      k1: unbiased value, may be negative. `E[grad k1] = 0`: use it in a reward, never as a loss.
      k2: biased value, `E[grad k2] = grad KL(policy || ref)`: the loss that descends the reverse KL.
      k3: unbiased value, never negative. `E[grad k3] = grad KL(ref || policy)`, the *forward* KL.

    Log-probs and result, nats, have any one shape; mask padding before the call. Raises ValueError on another
    estimator.

    Differs from the paper: the exponential is continued by its tangent above 20 nats, so k3 stays finite.
    """
    require_choice("estimator", estimator, KLEstimator)
    log_ratio = policy_logps.astype(jnp.float32) - jax.lax.stop_gradient(ref_logps.astype(jnp.float32))
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * jnp.square(log_ratio)
    return guarded_expm1(-log_ratio) + log_ratio
