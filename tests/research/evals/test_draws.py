"""Draws of samples: uniform, nested, repeatable; and what a draw is worth, against plain loops."""

import itertools

import numpy as np
import pytest
from scipy import stats

from research.evals.draws import pick, shuffles, subsets, vote


def test_every_subset_is_equally_likely():
    ranks = shuffles(5, 4000, seed=0, problem=0)
    places = {subset: i for i, subset in enumerate(itertools.combinations(range(5), 2))}
    counts = np.zeros(len(places))
    for row in ranks < 2:
        counts[places[tuple(np.flatnonzero(row))]] += 1
    assert stats.chisquare(counts).pvalue > 1e-3


def test_draws_are_nested_and_depend_on_seed_problem_and_trial_only():
    ranks = shuffles(6, 50, seed=3, problem=2)
    assert (np.sort(ranks, axis=1) == np.arange(6)).all()
    for n in range(1, 6):
        assert ((ranks < n) <= (ranks < n + 1)).all() and ((ranks < n).sum(axis=1) == n).all()
    np.testing.assert_array_equal(shuffles(6, 80, seed=3, problem=2)[:50], ranks)
    for other in (shuffles(6, 50, seed=4, problem=2), shuffles(6, 50, seed=3, problem=1)):
        assert (other != ranks).any()


def test_few_subsets_are_all_there_and_many_are_drawn():
    ranks = shuffles(6, 20, seed=0, problem=0)
    for k in (1, 3, 5, 6):
        expected = {frozenset(subset) for subset in itertools.combinations(range(6), k)}
        found = [frozenset(np.flatnonzero(row)) for row in subsets(ranks, k)]
        assert len(found) == len(expected) and set(found) == expected
    np.testing.assert_array_equal(subsets(ranks[:19], 3), ranks[:19] < 3)


@pytest.mark.parametrize("seed", range(5))
def test_a_vote_and_a_pick_against_loops(seed):
    rng = np.random.default_rng(seed)
    answers = [None if a == 0 else str(a) for a in rng.integers(0, 4, size=8)]
    correct, scores = rng.random(8) < 0.5, rng.integers(0, 3, size=8).astype(float)
    scores[rng.integers(8)] = -np.inf
    weights = np.where(np.isfinite(scores), scores, 0.0)
    ranks = shuffles(8, 60, seed=seed, problem=0)
    draws = ranks < 4
    votes, picks = vote(draws, answers, correct, weights), pick(draws, ranks, correct, scores)
    for row, rank, voted, picked in zip(draws, ranks, votes, picks, strict=True):
        members = np.flatnonzero(row)
        sums = {}
        for i in members:
            if answers[i] is not None:
                sums[answers[i]] = sums.get(answers[i], 0.0) + weights[i]
        winners = [a for a in sums if sums[a] == max(sums.values())]
        shares = [np.mean([correct[i] for i in members if answers[i] == a]) for a in winners]
        assert voted == pytest.approx(np.mean(shares) if shares else 0.0)
        assert picked == correct[min(members, key=lambda i: (-scores[i], rank[i]))]


def test_only_what_was_drawn_is_picked():
    ranks = shuffles(6, 40, seed=0, problem=0)
    correct = np.arange(6) % 2 == 0
    for scores in (np.full(6, -np.inf), np.zeros(6)):
        picks = pick(ranks >= 4, ranks, correct, scores)
        np.testing.assert_array_equal(picks, correct[(ranks == 4).argmax(axis=1)])


def test_nobody_votes():
    draws = np.ones((3, 2), bool)
    np.testing.assert_array_equal(vote(draws, [None, None], [True, True], [1.0, 1.0]), np.zeros(3))
    np.testing.assert_array_equal(vote(draws, ["a", "b"], [True, False], [0.0, 0.0]), np.full(3, 0.5))
