"""What the algorithms on pairs share: both sides' log-probs from one pass, and pairs from the policy's own samples."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from models.softmax import TokenLogps
from objectives.reduce import example_mean, reduce_metrics
from objectives.types import ObjectiveOutput
from research.algorithms.base import Algorithm, Frozen, Objective, Rollouts, Scalars, Summed
from research.config.schema import Key, number, static_number
from research.core.batch import PreferenceBatch, SequenceBatch
from research.core.network import Network, batch_logps


@dataclasses.dataclass(frozen=True)
class PairAlgorithm(Algorithm[PreferenceBatch]):
    """Learns from given pairs, or from the best and the worst of a prompt's own samples."""

    pairs_per_prompt: int = dataclasses.field(default=2, compare=False, kw_only=True)

    def from_rollouts(self, rollouts: Rollouts, seed: int) -> tuple[PreferenceBatch, dict[str, float]]:
        """`[P * pairs_per_prompt]` pairs of each group: best against worst by reward, second best against second worst.

        Ties are broken at random. A pair of equal rewards, or one more than a group can fill, has weight 0.
        """
        rng = np.random.default_rng(seed)
        G, rewards = rollouts.group_size, rollouts.rewards
        chosen, rejected, weights = [], [], []
        for start in range(0, len(rewards), G):
            order = start + rng.permutation(G)
            order = order[np.argsort(-rewards[order], kind="stable")]
            for pair in range(self.pairs_per_prompt):
                best, worst = order[pair % G], order[-1 - pair % G]
                chosen.append(best)
                rejected.append(worst)
                weights.append(pair < G // 2 and rewards[best] > rewards[worst])
        weight = np.array(weights, np.float32)
        batch = PreferenceBatch(
            rollouts.rows(np.array(chosen), weight),
            rollouts.rows(np.array(rejected), weight),
            margins=np.zeros_like(weight),
            soft_labels=np.ones_like(weight),
        )
        return batch, {"pairs": float(weight.sum()), "pairs_fraction": float(weight.mean())}


class ReferencePairs(Algorithm[PreferenceBatch]):
    """Reads both sides' token log-probs under a reference."""

    roles = ("reference",)

    def prepare(self, model: Network, batch: PreferenceBatch, scalars: Scalars, frozen: Frozen) -> PreferenceBatch:
        """Fills in the reference's log-probs."""
        assert frozen.reference is not None
        chosen, rejected = pair_logps(frozen.reference, batch)
        return batch.replace(ref_chosen_logps=chosen.logps, ref_rejected_logps=rejected.logps)


def both_sides(batch: PreferenceBatch) -> SequenceBatch:
    """`[2B, T]`: the chosen rows, then the rejected ones."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch.chosen, batch.rejected)


def pair_logps(model: Network, batch: PreferenceBatch) -> tuple[TokenLogps, TokenLogps]:
    """Both sides' token log-probs from one forward pass over `[2B, T]`."""
    scored = batch_logps(model, both_sides(batch))
    B = batch.chosen.tokens.shape[0]
    return TokenLogps(*(x[:B] for x in scored)), TokenLogps(*(x[B:] for x in scored))


def pair_masks(batch: PreferenceBatch) -> tuple[Bool[Array, "B T"], Bool[Array, "B T"]]:
    """Both sides' targets in the pairs that count: a NaN in a pair of weight 0 would reach the gradient."""
    used = (batch.chosen.weights > 0)[:, None]
    return batch.chosen.loss_mask & used, batch.rejected.loss_mask & used


def lengths(mask: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """Targets of each row."""
    return mask.sum(axis=1).astype(jnp.float32)


def mean_over_pairs(out: ObjectiveOutput, weights: Float[Array, " B"]) -> Summed:
    """Loss and metrics, each a weighted mean over pairs."""
    return example_mean(out.losses, weights), reduce_metrics(out.metrics, weights=weights)


PAIR_OPTIONS: Mapping[str, Key] = {
    "pairs_per_prompt": static_number(
        4, "With own samples: disjoint pairs of a group, at most.", 1, used=lambda _, facts: facts.online
    )
}

PairObjective = partial(
    Objective,
    given="preferences",
    own=True,
    rows_per_group=lambda options, _group_size: int(options["pairs_per_prompt"]),
)
"""An objective of a `PairAlgorithm`; its options hold `PAIR_OPTIONS`."""
BETA = number(0.1, "Inverse temperature of the implicit reward.", 1e-6, None, "at 0 the loss is constant")


def label_smoothing(used: Callable[[Any, Any], bool] | None = None) -> Key:
    """How noisy labels are."""
    return number(0.0, "Probability that a label is flipped.", 0, 0.4999, "at 0.5 the labels are noise", used=used)
