"""Direct preference optimisation, on given pairs or on pairs made from the policy's own samples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from models.config import ModelConfig
from models.transformer import Params
from objectives.dpo import dpo_loss
from objectives.reduce import example_mean, reduce_metrics, sequence_sum
from objectives.types import WeightedSum
from research.algorithms.base import Batch, DataKind, Rollouts, Scalars, batch_logps, sequence_rows
from research.batch import PreferenceBatch


@dataclasses.dataclass(frozen=True)
class DPO:
    """Sigmoid DPO (Rafailov et al. 2023, eq. 7).

    Attributes:
      data: "preferences" (a file of pairs) or "rollouts" (pairs of a correct and a wrong sample of a prompt,
        labelled by the verifier).
      pairs_per_prompt: with rollouts, at most this many disjoint pairs of each group.

    Scalars: `beta`, `label_smoothing`.
    """

    data: DataKind
    pairs_per_prompt: int = 2
    needs_reference: bool = True

    def loss(
        self, params: Params, config: ModelConfig, batch: Batch, scalars: Scalars
    ) -> tuple[WeightedSum, dict[str, WeightedSum]]:
        """Mean over pairs; log-probs are summed over the completion."""
        assert isinstance(batch, PreferenceBatch)
        weights = batch.chosen.weights
        chosen, rejected = _pair_logps(params, config, batch)
        used = weights > 0  # a NaN in a pair of weight 0 would still reach the gradient, as 0 * NaN
        out = dpo_loss(
            policy_chosen_logps=jnp.where(used, chosen, 0.0),
            policy_rejected_logps=jnp.where(used, rejected, 0.0),
            ref_chosen_logps=jnp.where(used, batch.ref_chosen_logps, 0.0),
            ref_rejected_logps=jnp.where(used, batch.ref_rejected_logps, 0.0),
            beta=scalars["beta"],
            label_smoothing=scalars["label_smoothing"],
        )
        return example_mean(out.losses, weights), reduce_metrics(out.metrics, weights=weights)

    def with_reference(self, params: Params, config: ModelConfig, batch: Batch, scalars: Scalars) -> Batch:
        """Fills in both sides' sequence log-probs under the reference."""
        del scalars
        assert isinstance(batch, PreferenceBatch)
        chosen, rejected = _pair_logps(params, config, batch)
        return batch.replace(ref_chosen_logps=chosen, ref_rejected_logps=rejected)

    def from_rollouts(self, rollouts: Rollouts, seed: int) -> tuple[Batch, dict[str, float]]:
        """`[P * pairs_per_prompt]` pairs of the best and the worst of a group; unfilled ones have weight 0."""
        rng = np.random.default_rng(seed)
        G, most = rollouts.group_size, self.pairs_per_prompt
        chosen, rejected, weights = [], [], []
        for start in range(0, len(rollouts.rewards), G):
            order = start + rng.permutation(G)
            order = order[np.argsort(-rollouts.rewards[order], kind="stable")]
            for pair in range(most):
                best, worst = order[pair], order[-1 - pair]
                chosen.append(best)
                rejected.append(worst)
                weights.append(pair < G // 2 and rollouts.rewards[best] > rollouts.rewards[worst])
        weight = np.array(weights, np.float32)
        batch = PreferenceBatch(
            sequence_rows(rollouts, np.array(chosen), weight),
            sequence_rows(rollouts, np.array(rejected), weight),
            np.zeros_like(weight),
            np.zeros_like(weight),
        )
        return batch, {"pairs": float(weight.sum()), "pairs_fraction": float(weight.mean())}


def _pair_logps(params: Params, config: ModelConfig, batch: PreferenceBatch) -> tuple[Array, Array]:
    """Sequence log-probs `[B]` of both sides from one forward pass over `[2B, T]`."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch.chosen, batch.rejected)
    logps = sequence_sum(batch_logps(params, config, both).logps, both.loss_mask)
    chosen, rejected = jnp.split(logps, 2)
    return chosen, rejected
