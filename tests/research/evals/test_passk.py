"""pass@k, maj@k and best-of-n against enumeration of all subsets and all tie-breaks."""

import itertools
import math

import numpy as np
import pytest

from research.core.errors import DataError
from research.evals.draws import shuffles, subsets, vote
from research.evals.passk import best_of_n, majority_at_k, mean_with_error, pass_at_k


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n):
    for k, c in itertools.product(range(1, n + 1), range(n + 1)):
        samples = [True] * c + [False] * (n - c)
        expected = np.mean([any(subset) for subset in itertools.combinations(samples, k)])
        np.testing.assert_allclose(pass_at_k(n, [c], k), [expected], atol=1e-12)


def test_pass_at_k_published_reference_and_large_n():
    # The numerically stable function printed in Chen et al. 2021, figure 3.
    def printed(n, c, k):
        return 1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))

    np.testing.assert_allclose(pass_at_k([200, 200, 10], [3, 0, 10], 10), [printed(200, 3, 10), 0.0, 1.0])
    exact = 1 - math.comb(99_950, 1000) / math.comb(100_000, 1000)
    np.testing.assert_allclose(pass_at_k(100_000, [50], 1000), [exact], rtol=1e-10)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 4, 2), (3, -1, 2), (3, 1, 0)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(DataError, match="pass@"):
        pass_at_k([8, n], [1, c], k)


def _majority_by_enumeration(answers, correct, k):
    """Every subset, every winner of a tie, with equal weight within the subset."""
    values = []
    for subset in itertools.combinations(range(len(answers)), k):
        given = [answers[i] for i in subset if answers[i] is not None]
        winners = [a for a in set(given) if given.count(a) == max(given.count(b) for b in given)]
        truth = {answers[i]: correct[i] for i in subset}
        values.append(sum(truth[winner] for winner in winners) / len(winners) if winners else 0.0)
    return sum(values) / len(values)


def test_majority_at_k_enumerated():
    rng = np.random.default_rng(0)
    for _ in range(20):
        answers = [None if a == 4 else str(a) for a in rng.integers(0, 5, size=6)]
        correct = [answer == "1" for answer in answers]
        for k in range(1, 7):
            expected = _majority_by_enumeration(answers, correct, k)
            np.testing.assert_allclose(majority_at_k([answers], [correct], k), [expected], atol=1e-12)


def test_majority_at_1_is_pass_at_1_without_abstentions():
    answers = [list("aabc"), list("xyzw")]
    correct = [[True, True, False, False], [False, False, False, True]]
    np.testing.assert_allclose(majority_at_k(answers, correct, 1), pass_at_k(4, [2, 1], 1))


def test_majority_by_resampling_comes_near_enumeration_and_repeats():
    answers, correct = list("aaaabbbbbccdd"), [True] * 4 + [False] * 9
    expected = _majority_by_enumeration(answers, correct, 5)  # 1287 subsets
    sampled = majority_at_k([answers], [correct], 5, trials=1000, seed=3)
    np.testing.assert_allclose(sampled, [expected], atol=4 * 0.5 / math.sqrt(1000))
    assert sampled == majority_at_k([answers], [correct], 5, trials=1000, seed=3)
    assert sampled != majority_at_k([answers], [correct], 5, trials=1000, seed=4)


def test_majority_by_resampling_draws_without_replacement():
    # 29 of 30 samples always hold at least 15 of the 16 right ones.
    answers, correct = ["a"] * 16 + ["b"] * 14, [True] * 16 + [False] * 14
    assert majority_at_k([answers], [correct], 29, trials=20) == 1.0


def test_majority_ties_and_abstentions():
    def majority_of(answers, correct):
        return float(majority_at_k([answers], [correct], len(answers))[0])

    assert majority_of(["1", "2"], [True, False]) == 0.5
    assert majority_of(["1", "2", "3"], [True, False, False]) == pytest.approx(1 / 3)
    assert majority_of([None, None, "1"], [False, False, True]) == 1.0
    assert majority_of([None, None], [False, False]) == 0.0
    assert majority_of(["1", "1", "2"], [True, False, False]) == 0.5  # one of the two was cut off
    with pytest.raises(DataError, match="maj@3: problem 1 has 2 samples"):
        majority_at_k([["a"] * 3, ["a"] * 2], [[True] * 3, [True] * 2], 3)


def _weighted_by_enumeration(answers, correct, weights, k):
    values = []
    for subset in itertools.combinations(range(len(answers)), k):
        sums = {}
        for i in subset:
            if answers[i] is not None:
                sums[answers[i]] = sums.get(answers[i], 0.0) + weights[i]
        winners = [a for a in sums if math.isclose(sums[a], max(sums.values()), rel_tol=1e-12)]
        truth = {answers[i]: correct[i] for i in subset}
        values.append(sum(truth[winner] for winner in winners) / len(winners) if winners else 0.0)
    return sum(values) / len(values)


def test_weighted_majority_enumerated():
    rng = np.random.default_rng(1)
    for trial in range(20):
        answers = [None if a == 3 else str(a) for a in rng.integers(0, 4, size=6)]
        correct = [answer == "1" for answer in answers]
        # tenths tie in some orders of addition only: 0.1 + 0.2 != 0.3
        weights = rng.integers(0, 4, size=6) / 10 if trial % 2 else rng.random(6)
        for k in range(1, 7):
            expected = _weighted_by_enumeration(answers, correct, weights, k)
            found = vote(subsets(shuffles(6, 400, seed=0, problem=0), k), answers, correct, weights)
            np.testing.assert_allclose(found.mean(), expected, atol=1e-12)


def test_equal_weights_are_a_plain_majority_at_any_scale():
    answers, correct = list("aabbcd"), [True, True, False, False, False, False]
    draws = subsets(shuffles(6, 400, seed=0, problem=0), 4)
    for scale in (1.0, 1e-12, 1e12):
        found = vote(draws, answers, correct, [scale] * 6).mean()
        np.testing.assert_allclose(found, majority_at_k([answers], [correct], 4)[0])


def _best_by_enumeration(scores, correct, n):
    """Every subset, every best sample among its equals."""
    values = []
    for subset in itertools.combinations(range(len(scores)), n):
        best = max(scores[i] for i in subset)
        values.append(np.mean([correct[i] for i in subset if scores[i] == best]))
    return np.mean(values)


@pytest.mark.parametrize("levels", [1, 2, 3, 100])
def test_best_of_n_enumerated(levels):
    rng = np.random.default_rng(levels)
    scores, correct = rng.integers(0, levels, size=(12, 7)).astype(float), rng.random((12, 7)) < 0.4
    scores[:, 3] = -np.inf
    scores[0] = -np.inf
    for n in range(1, 8):
        expected = [_best_by_enumeration(s, c, n) for s, c in zip(scores, correct, strict=True)]
        np.testing.assert_allclose(best_of_n(scores, correct, n), expected, atol=1e-12)


def test_best_of_n_between_its_limits():
    rng = np.random.default_rng(0)
    correct = rng.random((50, 40)) < rng.random((50, 1))
    for n in (1, 7, 40):
        passed, mean = pass_at_k(40, correct.sum(axis=1), n), correct.mean(axis=1)
        np.testing.assert_allclose(best_of_n(correct, correct, n), passed, atol=1e-12)
        np.testing.assert_allclose(best_of_n(np.zeros((50, 40)), correct, n), mean, atol=1e-12)
        np.testing.assert_allclose(best_of_n(~correct, correct, n), 1 - pass_at_k(40, 40 - correct.sum(1), n))
        assert (best_of_n(rng.random((50, 40)), correct, n) <= passed + 1e-12).all()


def test_best_of_n_refuses():
    correct = np.ones((2, 3), bool)
    for bad in (math.nan, math.inf):
        with pytest.raises(DataError, match=r"scores: problem 1, sample 2: got .* expected a score"):
            best_of_n([[0, 1, 2], [0, 1, bad]], correct, 2)
    with pytest.raises(DataError, match=r"pass@4: .* expected at least 4 samples"):
        best_of_n(np.zeros((2, 3)), correct, 4)


def test_mean_with_error_against_a_plain_bootstrap():
    values = np.random.default_rng(0).random(40) < 0.6
    estimate = mean_with_error(values, resamples=4000, seed=1)
    rng = np.random.default_rng(7)
    means = [np.mean(rng.choice(values, size=40)) for _ in range(4000)]
    np.testing.assert_allclose([estimate.low, estimate.high], np.percentile(means, [2.5, 97.5]), atol=0.026)
    mean = sum(map(float, values)) / 40
    assert estimate.mean == pytest.approx(mean)
    assert estimate.standard_error == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 39 / 40))
    assert estimate == mean_with_error(values, resamples=4000, seed=1)


def test_mean_with_error_of_one_problem_and_of_equal_ones():
    assert math.isnan(mean_with_error([1.0]).low)
    equal = mean_with_error([0.5, 0.5, 0.5])
    assert (equal.low, equal.high, equal.standard_error) == (0.5, 0.5, 0.0)
    with pytest.raises(DataError, match="one value a problem"):
        mean_with_error([])
