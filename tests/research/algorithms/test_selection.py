"""What rejection sampling and the algorithms on pairs choose from rollouts: on the host, before any model is called."""

import numpy as np
import pytest

from research.algorithms.dpo import DPO
from research.algorithms.reference_free import CPO, ORPO, SimPO
from research.algorithms.rejection_sampling import RejectionSampling
from research.core.batch import PreferenceBatch
from tests.research.algorithms.toy import rollouts

REWARDS = np.array([1, 1, 0, 1, 0, 0, 0, 0, 1, 1, 1, 0.0])
LENGTHS = np.array([6, 4, 1, 2, 3, 3, 3, 3, 5, 2, 7, 1])
STOPPED = np.array([True] * 9 + [False, True, True])


def names(tokens: np.ndarray) -> list[int]:
    """Which rollout each row is: its completion starts with 4 + its number."""
    return (tokens[:, 3] - 4).tolist()


def test_keeps_the_leanest_of_the_correct_that_stopped() -> None:
    algorithm = RejectionSampling(keep_per_prompt=2, selector="leanest")
    batch, metrics = algorithm.from_rollouts(rollouts(REWARDS, LENGTHS, group_size=4, stopped=STOPPED), seed=1)
    np.testing.assert_array_equal(batch.weights, [1, 1, 0, 0, 1, 1])
    assert names(batch.tokens)[:2] == [3, 1]  # of 0, 1, 3 the two shortest, shortest first
    assert names(batch.tokens)[4:] == [8, 10]  # 9 is shorter, but was cut off
    assert metrics == pytest.approx({"selected": 4.0, "selected_fraction": 4 / 6})


def test_at_most_k_of_a_prompt_and_fewer_where_fewer_are_correct() -> None:
    algorithm = RejectionSampling(keep_per_prompt=4)
    batch, metrics = algorithm.from_rollouts(rollouts(REWARDS, LENGTHS, group_size=4, stopped=STOPPED), seed=1)
    assert batch.weights.reshape(3, 4).sum(axis=1).tolist() == [3, 0, 2] and metrics["selected"] == 5
    kept = [n for n, w in zip(names(batch.tokens), batch.weights, strict=True) if w]
    assert sorted(kept) == [0, 1, 3, 8, 10]  # each once


def test_correctness_decides_whatever_the_reward() -> None:
    drawn = rollouts(REWARDS, LENGTHS, group_size=4)
    drawn = drawn._replace(rewards=-drawn.rewards)
    batch, _ = RejectionSampling(keep_per_prompt=1).from_rollouts(drawn, seed=1)
    assert batch.weights.tolist() == [1, 0, 1]


def test_the_random_control_ignores_length_and_depends_on_the_seed_alone() -> None:
    algorithm = RejectionSampling(keep_per_prompt=1, selector="random")
    drawn = rollouts(REWARDS, LENGTHS, group_size=4)
    picks = [names(algorithm.from_rollouts(drawn, seed=s)[0].tokens)[0] for s in range(40)]
    assert set(picks) == {0, 1, 3}
    assert picks == [names(algorithm.from_rollouts(drawn, seed=s)[0].tokens)[0] for s in range(40)]


def test_ties_in_length_are_broken_at_random() -> None:
    algorithm = RejectionSampling(keep_per_prompt=1)
    drawn = rollouts(np.ones(4), np.full(4, 3), group_size=4)
    assert len({names(algorithm.from_rollouts(drawn, seed=s)[0].tokens)[0] for s in range(40)}) == 4


def test_nothing_selected_is_a_batch_without_weight() -> None:
    drawn = rollouts(np.zeros(8), np.full(8, 3), group_size=4)
    for algorithm in (RejectionSampling(), DPO()):
        batch, metrics = algorithm.from_rollouts(drawn, seed=0)
        rows = batch.chosen if isinstance(algorithm, DPO) else batch
        assert not rows.weights.any() and sum(metrics.values()) == 0
        assert rows.tokens.shape == (4, 11)


@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_a_correct_and_a_wrong_sample_of_one_prompt_each_used_once(seed: int) -> None:
    drawn = rollouts(REWARDS, LENGTHS, group_size=4)
    batch, metrics = ORPO(pairs_per_prompt=2).from_rollouts(drawn, seed)
    np.testing.assert_array_equal(batch.chosen.weights, [1, 0, 0, 0, 1, 0])  # one wrong sample, none, one
    np.testing.assert_array_equal(batch.chosen.weights, batch.rejected.weights)
    assert not batch.margins.any() and (batch.soft_labels == 1).all()
    assert metrics == pytest.approx({"pairs": 2.0, "pairs_fraction": 2 / 6})
    used = batch.chosen.weights > 0
    chosen, rejected = (np.array(names(side.tokens))[used] for side in (batch.chosen, batch.rejected))
    assert (REWARDS[chosen] == 1).all() and rejected.tolist() == [2, 11]
    assert (chosen // 4 == rejected // 4).all()


def test_pairs_are_disjoint_and_drawn_at_random() -> None:
    drawn = rollouts(np.array([1, 1, 0, 0, 1, 0, 0, 0.0]), np.full(8, 3), group_size=4)
    first = set()
    for seed in range(20):
        batch, _ = ORPO(pairs_per_prompt=2).from_rollouts(drawn, seed)
        assert batch.chosen.weights.tolist() == [1, 1, 1, 0]
        pair = names(batch.chosen.tokens)[:2] + names(batch.rejected.tokens)[:2]
        assert sorted(pair) == [0, 1, 2, 3]
        first.add((pair[0], pair[2]))
    assert len(first) == 4


def test_pairs_are_best_against_worst_by_reward() -> None:
    rewards = np.array([0.1, 0.9, 0.5, 0.4, 0.2])
    for algorithm in (DPO(pairs_per_prompt=3), CPO(pairs_per_prompt=3), SimPO(pairs_per_prompt=3)):
        batch, _ = algorithm.from_rollouts(rollouts(rewards, np.full(5, 3), group_size=5), seed=0)
        assert names(batch.chosen.tokens)[:2] == [1, 2] and names(batch.rejected.tokens)[:2] == [0, 4]
        assert batch.chosen.weights.tolist() == [1, 1, 0]  # a third pair would use the middle one twice
        assert isinstance(batch, PreferenceBatch) and batch.ref_chosen_logps is None


def test_more_pairs_than_a_group_has_members_are_unfilled() -> None:
    drawn = rollouts(np.array([1, 0, 0, 1.0]), np.full(4, 3), group_size=2)
    batch, metrics = DPO(pairs_per_prompt=4).from_rollouts(drawn, seed=0)
    assert batch.chosen.weights.tolist() == [1, 0, 0, 0] * 2 and metrics["pairs"] == 2


def test_a_chosen_row_is_the_whole_rollout() -> None:
    drawn = rollouts(REWARDS, LENGTHS, group_size=4)
    rows = drawn.rows(np.array([3]), np.array([2.0]))
    np.testing.assert_array_equal(rows.tokens[0, 3:5], drawn.tokens[3, :2])
    assert rows.loss_mask.sum() == 2 and rows.weights.tolist() == [2.0]


def test_rows_of_rollouts_are_the_chosen_ones_and_given_tokens_are_counted_apart() -> None:
    drawn = rollouts(REWARDS, LENGTHS, group_size=4)
    assert drawn.given_lengths.tolist() == [0] * 12
    given = np.zeros(drawn.mask.shape, bool)
    given[1, 4:6], given[3, 2:7] = True, True
    assert drawn._replace(given=given).given_lengths.tolist() == [0, 2, 0, 5, *[0] * 8]
    chosen = drawn.rows(np.array([5, 2]), np.ones(2, np.float32))
    assert names(chosen.tokens) == [5, 2]
