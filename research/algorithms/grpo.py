"""Group-relative policy optimisation: GRPO as published and Dr. GRPO are settings of one algorithm."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.transformer import Params
from objectives.advantages import Baseline, Normalization, frac_reward_zero_std, group_advantages
from objectives.grpo import LossKLEstimator, grpo_loss
from objectives.reduce import Aggregation, reduce, reduce_metrics
from objectives.types import WeightedSum
from research.algorithms.base import (
    Batch,
    DataKind,
    Rollouts,
    Scalars,
    after_prompt,
    batch_logps,
    sequence_rows,
)
from research.batch import RolloutBatch


@dataclasses.dataclass(frozen=True)
class GRPO:
    """Clipped surrogate on group-relative advantages (Shao et al. 2024, eq. 3).

    GRPO: aggregation "sequence_mean", normalization "group". Dr. GRPO (Liu et al. 2025): "constant", "none".

    Attributes:
      aggregation: how tokens become one number.
      normalization: what divides the centred reward.
      baseline: what is subtracted from the reward.
      ddof: of the standard deviation.
      kl_estimator: estimator of the KL term in the loss.
      needs_reference: whether there is a KL term.
      max_new_tokens: N; the constant of the "constant" aggregation.

    Scalars: `clip_eps_low`, `clip_eps_high`, `beta`, `temperature`.
    """

    aggregation: Aggregation
    # Read on the host only: a change of them does not recompile the step.
    normalization: Normalization = dataclasses.field(compare=False)
    baseline: Baseline = dataclasses.field(compare=False)
    ddof: int = dataclasses.field(compare=False)
    kl_estimator: LossKLEstimator
    needs_reference: bool
    max_new_tokens: int
    data: DataKind = "rollouts"

    def loss(
        self, params: Params, config: ModelConfig, batch: Batch, scalars: Scalars
    ) -> tuple[WeightedSum, dict[str, WeightedSum]]:
        """The surrogate at the rollout's temperature, reduced as configured."""
        assert isinstance(batch, RolloutBatch)
        rows = batch.sequences
        # A NaN in a row of weight 0 would still reach the gradient, as 0 * NaN.
        mask = rows.loss_mask & (rows.weights > 0)[:, None]
        scored = batch_logps(params, config, rows, scalars["temperature"])
        out = grpo_loss(
            policy_logps=scored.logps,
            old_logps=batch.old_logps,
            advantages=batch.advantages,
            completion_mask=mask,
            clip_eps_low=scalars["clip_eps_low"],
            clip_eps_high=scalars["clip_eps_high"],
            ref_logps=batch.ref_logps if self.needs_reference else None,
            beta=scalars["beta"] if self.needs_reference else 0.0,
            kl_estimator=self.kl_estimator,
        )
        gap = jnp.abs(jax.lax.stop_gradient(scored.logps) - batch.old_logps)
        metrics = {**out.metrics, "entropy": scored.entropy, "sampler_trainer_gap": gap}
        loss = reduce(
            out.losses,
            mask,
            aggregation=self.aggregation,
            max_length=float(self.max_new_tokens),
            weights=rows.weights,
        )
        return loss, reduce_metrics(metrics, mask=mask, weights=rows.weights)

    def with_reference(self, params: Params, config: ModelConfig, batch: Batch, scalars: Scalars) -> Batch:
        """Fills in the reference's log-probs, at the same temperature as the policy's."""
        assert isinstance(batch, RolloutBatch)
        scored = batch_logps(params, config, batch.sequences, scalars["temperature"])
        return batch.replace(ref_logps=scored.logps)

    def from_rollouts(self, rollouts: Rollouts, seed: int) -> tuple[Batch, dict[str, float]]:
        """All B rows, each with its group-relative advantage."""
        del seed
        rewards = jnp.asarray(rollouts.rewards, jnp.float32)
        advantages = group_advantages(
            rewards,
            rollouts.group_size,
            baseline=self.baseline,
            normalization=self.normalization,
            ddof=self.ddof,
        )
        B = len(rollouts.rewards)
        old_logps = after_prompt(rollouts.sampler_logps, rollouts.prompt_tokens.shape[1])
        batch = RolloutBatch(
            sequence_rows(rollouts, np.arange(B), np.ones(B)),
            np.asarray(advantages),
            old_logps,
            np.zeros_like(old_logps),
        )
        return batch, {"frac_reward_zero_std": float(frac_reward_zero_std(rewards, rollouts.group_size))}
