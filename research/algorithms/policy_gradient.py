"""What the policy gradients on rollouts share: GRPO's family and PPO."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from objectives.kl import LossKLEstimator
from objectives.reduce import Aggregation, reduce, reduce_metrics
from research.algorithms.base import Algorithm, Frozen, Role, Rollouts, Scalars, Summed, rollout_batch
from research.core.batch import RolloutBatch
from research.core.network import batch_logps

NO_K1 = (
    "k1 belongs in the reward: as a loss its expected gradient is zero (E[grad log pi] = 0), noise with no pull to "
    "the reference"
)
"""Why a KL in the loss is not estimated by k1."""


@dataclasses.dataclass(frozen=True)
class PolicyGradient(Algorithm[RolloutBatch]):
    """A surrogate of the policy gradient on all B rows of an iteration, at the rollout's temperature."""

    max_new_tokens: int  # N; the constant of the "constant" aggregation
    aggregation: Aggregation = "token_mean"
    kl: Literal["none", "loss", "reward"] = "none"  # where the KL to the reference enters; in the reward it is k1
    kl_estimator: LossKLEstimator = "k3"
    mask_truncated: bool = dataclasses.field(default=False, compare=False)

    @property
    def roles(self) -> tuple[Role, ...]:
        """A reference where there is a KL term."""
        return () if self.kl == "none" else ("reference",)

    def from_rollouts(self, rollouts: Rollouts, seed: int) -> tuple[RolloutBatch, dict[str, float]]:
        """All B rows; advantages follow in `prepare`, which sees the whole batch."""
        return rollout_batch(rollouts, mask_truncated=self.mask_truncated), {}

    def reference_logps(self, batch: RolloutBatch, scalars: Scalars, frozen: Frozen) -> Float[Array, "B T"] | None:
        """The reference's log-probs of every drawn token, nats; None where there is none."""
        if frozen.reference is None:
            return None
        return batch_logps(frozen.reference, batch.drawn, scalars["temperature"]).logps

    def summed(
        self, batch: RolloutBatch, mask: Array, policy_logps: Array, losses: Array, metrics: dict[str, Array]
    ) -> Summed:
        """Loss and metrics over the tokens of `mask`, and the gap between sampler and trainer."""
        gap = jnp.abs(policy_logps - batch.sampler_logps)
        metrics = jax.lax.stop_gradient({**metrics, "sampler_trainer_gap": gap})
        weights, longest = batch.sequences.weights, float(self.max_new_tokens)
        loss = reduce(losses, mask, aggregation=self.aggregation, max_length=longest, weights=weights)
        return loss, reduce_metrics(metrics, mask=mask, weights=weights)
