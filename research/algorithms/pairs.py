"""What the algorithms on pairs share: both sides' log-probs from one pass, and pairs from the policy's own samples."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from models.config import ModelConfig
from models.softmax import TokenLogps
from models.transformer import Params
from objectives.reduce import example_mean, reduce_metrics, sequence_sum
from objectives.types import ObjectiveOutput
from research.algorithms.base import Algorithm, Batch, Frozen, Rollouts, Summed, sequence_rows
from research.config.schema import Key, static_number
from research.core.batch import PreferenceBatch, SequenceBatch
from research.core.network import batch_logps


@dataclasses.dataclass(frozen=True)
class PairAlgorithm(Algorithm):
    """Learns from given pairs, or from the best and the worst of a prompt's own samples.

    Attributes:
      pairs_per_prompt: with own samples, at most this many disjoint pairs of each group.
    """

    # Read on the host only: a change of it does not recompile the step.
    pairs_per_prompt: int = dataclasses.field(default=2, compare=False, kw_only=True)

    def from_rollouts(self, rollouts: Rollouts, seed: int) -> tuple[Batch, dict[str, float]]:
        """`[P * pairs_per_prompt]` pairs; see `best_and_worst`."""
        return best_and_worst(rollouts, seed, self.pairs_per_prompt)


def best_and_worst(rollouts: Rollouts, seed: int, pairs_per_prompt: int) -> tuple[PreferenceBatch, dict[str, float]]:
    """Disjoint pairs of each group: best against worst by reward, second best against second worst, ...

    Ties are broken at random. A pair of equal rewards, or one more than a group can fill, has weight 0.
    """
    rng = np.random.default_rng(seed)
    G = rollouts.group_size
    chosen, rejected, weights = [], [], []
    for start in range(0, len(rollouts.rewards), G):
        order = start + rng.permutation(G)
        order = order[np.argsort(-rollouts.rewards[order], kind="stable")]
        for pair in range(pairs_per_prompt):
            best, worst = order[pair % G], order[-1 - pair % G]
            chosen.append(best)
            rejected.append(worst)
            weights.append(pair < G // 2 and rollouts.rewards[best] > rollouts.rewards[worst])
    weight = np.array(weights, np.float32)
    batch = PreferenceBatch(
        sequence_rows(rollouts, np.array(chosen), weight),
        sequence_rows(rollouts, np.array(rejected), weight),
        margins=np.zeros_like(weight),
        soft_labels=np.ones_like(weight),
    )
    return batch, {"pairs": float(weight.sum()), "pairs_fraction": float(weight.mean())}


def both_sides(batch: PreferenceBatch) -> SequenceBatch:
    """`[2B, T]`: the chosen rows, then the rejected ones."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch.chosen, batch.rejected)


def pair_logps(params: Params, config: ModelConfig, batch: PreferenceBatch) -> tuple[TokenLogps, TokenLogps]:
    """Both sides' token log-probs from one forward pass over `[2B, T]`."""
    scored = batch_logps(params, config, both_sides(batch))
    B = batch.chosen.tokens.shape[0]
    return TokenLogps(*(x[:B] for x in scored)), TokenLogps(*(x[B:] for x in scored))


def pair_masks(batch: PreferenceBatch) -> tuple[Bool[Array, "B T"], Bool[Array, "B T"]]:
    """Both sides' targets in the pairs that count: a NaN in a pair of weight 0 would reach the gradient."""
    used = (batch.chosen.weights > 0)[:, None]
    return batch.chosen.loss_mask & used, batch.rejected.loss_mask & used


def pair_sums(logps: tuple[Array, Array], masks: tuple[Array, Array]) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Both sides' sequence log-probs."""
    return sequence_sum(logps[0], masks[0]), sequence_sum(logps[1], masks[1])


def lengths(mask: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """Targets of each row."""
    return mask.sum(axis=1).astype(jnp.float32)


def with_reference(batch: Batch, frozen: Frozen) -> PreferenceBatch:
    """The batch with the reference's token log-probs of both sides."""
    assert isinstance(batch, PreferenceBatch) and frozen.reference is not None
    chosen, rejected = pair_logps(frozen.reference.params, frozen.reference.config, batch)
    return batch.replace(ref_chosen_logps=chosen.logps, ref_rejected_logps=rejected.logps)


def mean_over_pairs(out: ObjectiveOutput, weights: Float[Array, " B"]) -> Summed:
    """Loss and metrics, each a weighted mean over pairs."""
    return example_mean(out.losses, weights), reduce_metrics(out.metrics, weights=weights)


PAIR_OPTIONS: Mapping[str, Key] = {
    "pairs_per_prompt": static_number(
        4, "With own samples: disjoint pairs of a group, at most.", 1, used=lambda _, facts: facts.online
    )
}


def pairs_per_group(options: Mapping[str, Any], group_size: int) -> int:
    """Rows of the batch from one prompt."""
    del group_size
    return int(options["pairs_per_prompt"])
