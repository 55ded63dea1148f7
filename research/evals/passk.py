"""pass@k, maj@k and best-of-n from samples per problem, and bootstrap error bars over the problems.

Every estimator returns one value per problem, `[P]` float64, so that two models can be compared problem by problem;
`mean_with_error` turns them into a mean with an interval. P problems, n samples a problem.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from research.core.errors import DataError
from research.evals.draws import Values, shuffles, subsets, vote


@dataclass(frozen=True)
class Estimate:
    """A mean over problems, its standard error and 95% interval (all three NaN for a single problem)."""

    mean: float
    standard_error: float
    low: float
    high: float


def pass_at_k(num_samples: ArrayLike, num_correct: ArrayLike, k: int) -> Values:
    """The chance that at least one of k >= 1 samples is correct, estimated without bias from n samples, c correct.

    `pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n-c+1}^{n} (1 - k / i)` (Chen et al. 2021, "Evaluating
    Large Language Models Trained on Code", eq. 1); the product needs no large binomials. DataError unless c <= n >= k.
    """
    correct = np.atleast_1d(np.asarray(num_correct, dtype=np.int64))
    samples = np.broadcast_to(np.asarray(num_samples, dtype=np.int64), correct.shape)
    wrong = np.flatnonzero((samples < max(k, 1)) | (correct < 0) | (correct > samples))
    if wrong.size or k < 1:
        place = wrong[0] if wrong.size else 0
        found = f"problem {place} has {correct[place]} correct of {samples[place]} samples"
        raise DataError(f"pass@{k}: {found}, expected at least {max(k, 1)} samples, and no more correct ones.")
    return np.array([1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)) if n - c >= k else 1.0
                     for n, c in zip(samples, correct, strict=True)])  # fmt: skip


def majority_at_k(
    answers: Sequence[Sequence[str | None]],
    correct: Sequence[Sequence[bool]] | NDArray[Any],
    k: int,
    *,
    trials: int = 400,
    seed: int = 0,
) -> Values:
    """maj@k (self-consistency, Wang et al. 2022): the chance that the majority of k samples is right.

    Without bias, over the subsets of k of the n samples: over all of them where there are at most `trials`,
    otherwise over `trials` random ones (as the resampled trials of prm800k's evaluation, Lightman et al. 2023).
    Ties are broken by a fair draw, in expectation. The subsets of a problem depend on `seed` and its place only.

    Args:
      answers: [P][n] final answers, in one spelling per value; None abstains.
      correct: [P][n]. Should samples of one answer differ, their share counts.
      k: votes, 1..n; DataError otherwise.
      trials, seed: of the random subsets.
    """
    values = []
    for problem, (row, right) in enumerate(zip(answers, correct, strict=True)):
        n = len(row)
        if not 1 <= k <= n:
            raise DataError(f"maj@{k}: problem {problem} has {n} samples, expected at least {max(k, 1)}.")
        draws = subsets(shuffles(n, trials, seed=seed, problem=problem), k)
        values.append(float(vote(draws, row, right, np.ones(n)).mean()))
    return np.array(values, dtype=np.float64)


def best_of_n(scores: ArrayLike, correct: ArrayLike, n: int) -> Values:
    """The chance that the sample with the highest score among n is right: exact, over all subsets of n of M samples.

    With the samples ranked by score, the best of n is the r-th with the chance that the subset holds it and none
    above it, `C(M - r, n - 1) / C(M, n)`; samples of equal score share the chances of their ranks. Equal scores give
    the mean of `correct`; `correct` as the score gives pass@n.

    Args:
      scores: [P, M]; -inf for a sample that is chosen only where there is no other. DataError for NaN and +inf.
      correct: [P, M].
      n: samples to choose from, 1..M; DataError otherwise.
    """
    right = np.asarray(correct, dtype=np.float64)
    P, M = right.shape
    found = check_scores(scores, name="scores")
    order = np.argsort(-found, axis=1, kind="stable")
    found, right = (np.take_along_axis(array, order, axis=1) for array in (found, right))
    # The best of n is among the first r of the ranking exactly where one of these is drawn: pass@n of r in M.
    chances = np.diff(pass_at_k(M, np.arange(M + 1), n))
    starts = np.ones((P, M), dtype=np.int64)
    starts[:, 1:] = found[:, 1:] != found[:, :-1]
    groups = np.cumsum(starts.ravel()) - 1  # of equal scores, problem after problem
    share = np.bincount(groups, weights=right.ravel()) / np.bincount(groups)
    return (share[groups].reshape(P, M) * chances).sum(axis=1)


def check_scores(scores: ArrayLike, *, name: str) -> Values:
    """A scorer's scores [P, M] as float64; DataError for NaN and +inf, which names the problem and the sample."""
    found = np.asarray(scores, dtype=np.float64)
    wrong = np.argwhere(np.isnan(found) | np.isposinf(found))
    if len(wrong):
        problem, sample = wrong[0]
        more = f" (and {len(wrong) - 1} more such)" if len(wrong) > 1 else ""
        raise DataError(
            f"{name}: problem {problem}, sample {sample}: got {found[problem, sample]}, expected a score that is a "
            f"number or -inf{more}."
        )
    return found


def mean_with_error(values: ArrayLike, *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean over P >= 1 problems with a 95% percentile bootstrap over the problems, model and samples held fixed."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise DataError(f"mean over problems: got an array of shape {array.shape}, expected one value a problem.")
    if array.size == 1:
        return Estimate(float(array[0]), math.nan, math.nan, math.nan)
    result = stats.bootstrap(
        (array,), np.mean, n_resamples=resamples, batch=100, method="percentile", rng=np.random.default_rng(seed)
    )
    low, high = result.confidence_interval
    return Estimate(float(array.mean()), float(array.std(ddof=1) / math.sqrt(array.size)), float(low), float(high))
