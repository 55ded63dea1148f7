"""Reward models from tokens to loss, against NumPy that shares nothing with them but the scorer's outputs."""

from typing import Any

import jax
import numpy as np
import pytest

from research.algorithms.base import Setting
from research.algorithms.reward_model import PROVIDES, RankingRewardModel, RewardModel
from research.core.batch import SequenceBatch
from research.train.step import eval_step
from tests.research.algorithms import hand
from tests.research.algorithms.toy import MODEL, host_batch, host_params, objective_scalars


@pytest.fixture(scope="module")
def scorer() -> Any:
    return host_params(layout="scorer")


def scores(scorer: Any, rows: SequenceBatch) -> np.ndarray:
    """Read at the last token of each row, whose number is its length."""
    outputs = hand.outputs(scorer, rows)[:, :, 0]
    return np.array([outputs[b, int(n) - 1] for b, n in enumerate(rows.segment_ids.sum(axis=1))])


def evaluate(algorithm: Any, scorer: Any, batch: Any, **changes: float) -> dict[str, Any]:
    scalars = objective_scalars(algorithm, **changes)
    return eval_step(scorer, batch, scalars, algorithm=algorithm, config=MODEL)


def test_pairs_equal_numpy_with_margins_soft_labels_and_centering(scorer: Any) -> None:
    batch = host_batch(RewardModel())
    chosen, rejected = scores(scorer, batch.chosen), scores(scorer, batch.rejected)
    d, p = chosen - rejected - batch.margins, batch.soft_labels
    losses = -p * np.log(hand.sigmoid(d)) - (1 - p) * np.log(hand.sigmoid(-d)) + 0.1 * (chosen + rejected) ** 2
    found = evaluate(RewardModel(), scorer, batch)
    weights = batch.chosen.weights
    assert float(found["loss"].mean()) == pytest.approx(hand.mean(losses, weights), rel=1e-5)
    assert float(found["rewards_chosen"].mean()) == pytest.approx(hand.mean(chosen, weights), rel=1e-5)
    assert float(found["reward_accuracy"].mean()) == pytest.approx(hand.mean(chosen > rejected, weights))


def test_rankings_equal_numpy_over_the_pairs_of_each_prompt(scorer: Any) -> None:
    batch = host_batch(RankingRewardModel())
    P, K = batch.ranks.shape
    total = count = 0.0
    without = []
    for p in range(P):
        rows = jax.tree.map(lambda x, p=p: x[p], batch.rows)
        r, there = scores(scorer, rows), rows.weights > 0
        pairs = [
            (i, j)
            for i in range(K)
            for j in range(K)
            if there[i] and there[j] and batch.ranks[p, i] < batch.ranks[p, j]
        ]
        without.append(not pairs)
        if pairs:
            losses = [-np.log(hand.sigmoid(r[i] - r[j])) + 0.1 * (r[i] + r[j]) ** 2 for i, j in pairs]
            total += rows.weights.max() * np.mean(losses)
            count += rows.weights.max()
    found = evaluate(RankingRewardModel(), scorer, batch)
    assert float(found["loss"].mean()) == pytest.approx(total / count, rel=1e-5)
    assert float(found["loss"].count) == pytest.approx(count)
    weights = batch.rows.weights.max(axis=1)
    assert float(found["no_pair"].mean()) == pytest.approx(hand.mean(np.array(without), weights))
    assert 0 < count < weights.sum()  # some prompts have a pair, some have none


def test_two_ranked_candidates_are_a_pair(scorer: Any) -> None:
    pairs = host_batch(RewardModel())
    plain = pairs.replace(margins=np.zeros(8, np.float32), soft_labels=np.ones(8, np.float32))
    sides = pairs.chosen, pairs.rejected
    stacked = jax.tree.map(lambda *x: np.stack(x, axis=1), *sides)
    ranking = host_batch(RankingRewardModel()).replace(
        rows=stacked.replace(weights=np.stack([pairs.chosen.weights] * 2, axis=1)),
        ranks=np.tile(np.array([0, 1], np.int32), (8, 1)),
    )
    one = evaluate(RewardModel(), scorer, plain)["loss"]
    other = evaluate(RankingRewardModel(), scorer, ranking)["loss"]
    assert float(one.mean()) == pytest.approx(float(other.mean()), rel=1e-5)


def test_the_config_finds_both() -> None:
    found = PROVIDES["objective"]
    kinds = {"reward_model": (RewardModel(), "preferences"), "reward_model_ranking": (RankingRewardModel(), "rankings")}
    for name, (algorithm, given) in kinds.items():
        assert (
            found[name].make(Setting({}, False, 2, 1)) == algorithm
            and found[name].given == given
            and not found[name].own
        )
        assert algorithm.layout == "scorer" and found[name].options.keys() == objective_scalars(algorithm).keys()
