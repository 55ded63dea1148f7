"""Reward models: a scorer trained on pairs or on ranked candidates of one prompt."""

import dataclasses

import jax
import jax.numpy as jnp

from objectives.bradley_terry import bradley_terry_loss, ranking_loss
from objectives.reduce import example_mean, reduce_metrics
from research.algorithms.base import Algorithm, Frozen, Objective, Scalars, Summed, provides
from research.algorithms.pairs import both_sides, mean_over_pairs
from research.config.schema import number
from research.core.batch import PreferenceBatch, RankingBatch
from research.core.network import Network
from research.rewards.learned import score_rows


@dataclasses.dataclass(frozen=True)
class RewardModel(Algorithm[PreferenceBatch]):
    """Bradley-Terry on pairs (Ouyang et al. 2022, eq. 1 with K = 2), with margins and soft labels of the data."""

    layout = "scorer"

    def loss(self, model: Network, batch: PreferenceBatch, scalars: Scalars, frozen: Frozen) -> Summed:
        """Mean over pairs; both sides' scores come from one pass, each read at its last real token."""
        used = batch.chosen.weights > 0
        chosen, rejected = jnp.split(score_rows(model, both_sides(batch)), 2)
        out = bradley_terry_loss(
            chosen_scores=jnp.where(used, chosen, 0.0),
            rejected_scores=jnp.where(used, rejected, 0.0),
            margins=jnp.where(used, batch.margins, 0.0),
            soft_labels=jnp.where(used, batch.soft_labels, 1.0),
            center_coef=scalars["center_coef"],
        )
        return mean_over_pairs(out, batch.chosen.weights)


@dataclasses.dataclass(frozen=True)
class RankingRewardModel(Algorithm[RankingBatch]):
    """All pairs of a prompt's ranked candidates, averaged within the prompt (Ouyang et al. 2022, eq. 1).

    A prompt has the largest weight of its candidates; one without a pair (all ties) has weight 0.
    """

    layout = "scorer"

    def loss(self, model: Network, batch: RankingBatch, scalars: Scalars, frozen: Frozen) -> Summed:
        """Mean over prompts."""
        P, K = batch.ranks.shape
        flat = jax.tree.map(lambda x: x.reshape(P * K, *x.shape[2:]), batch.rows)
        out = ranking_loss(
            scores=score_rows(model, flat).reshape(P, K),
            ranks=batch.ranks,
            mask=batch.rows.weights > 0,
            center_coef=scalars["center_coef"],
        )
        weights = batch.rows.weights.max(axis=1)
        with_pair = weights * (1.0 - out.metrics["no_pair"])
        metrics = reduce_metrics(out.metrics, weights=with_pair)
        metrics |= reduce_metrics({"no_pair": out.metrics["no_pair"]}, weights=weights)
        return example_mean(out.losses, with_pair), metrics


_OPTIONS = {"center_coef": number(0.0, "Weight of the squared sum of a pair's scores.", 0)}


PROVIDES = provides(
    Objective("reward_model", RewardModel.from_setting, _OPTIONS, given="preferences"),
    Objective("reward_model_ranking", RankingRewardModel.from_setting, _OPTIONS, given="rankings"),
)
