"""pass@k, maj@k and exact match from samples per problem, and bootstrap error bars over the problems.

Every estimator returns one value per problem, so that two models can be compared problem by problem;
`mean_with_error` turns them into a mean with an interval.

P problems, n samples a problem.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from research.errors import DataError

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over problems, its standard error and 95% interval (both NaN for a single problem)."""

    mean: float
    standard_error: float
    low: float
    high: float


def pass_at_k(num_samples: ArrayLike, num_correct: ArrayLike, k: int) -> Values:
    """The chance that at least one of k samples is correct, estimated without bias from n >= k samples.

    `pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n-c+1}^{n} (1 - k / i)` (Chen et al. 2021, "Evaluating
    Large Language Models Trained on Code", eq. 1); the product needs no large binomials.

    Args:
      num_samples: [P] or a number, n.
      num_correct: [P], c, with 0 <= c <= n.
      k: samples that one may try.

    Returns:
      [P] float64.

    Raises:
      DataError: a problem has fewer than k samples, or more correct ones than samples.
    """
    correct = np.atleast_1d(np.asarray(num_correct, dtype=np.int64))
    samples = np.broadcast_to(np.asarray(num_samples, dtype=np.int64), correct.shape)
    if k < 1:
        raise DataError(f"pass@k: got k = {k}, expected >= 1.")
    for problem, (n, c) in enumerate(zip(samples, correct, strict=True)):
        if n < k:
            raise DataError(f"pass@{k}: problem {problem} has {n} samples, expected at least {k}.")
        if not 0 <= c <= n:
            raise DataError(f"pass@{k}: problem {problem} has {c} correct of {n} samples.")
    return np.array(
        [1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)) if n - c >= k else 1.0
         for n, c in zip(samples, correct, strict=True)],
        dtype=np.float64,
    )  # fmt: skip


def majority_of(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """The chance that the most frequent answer is right, where ties are broken by a fair draw.

    Args:
      answers: the final answer taken from each sample, in one spelling per value; None abstains.
      correct: whether each sample is right. Should samples of one answer differ, their share counts.

    Returns:
      The expected value over the tie-break; 0 if all abstain.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    shares = [
        sum(right for given, right in zip(answers, correct, strict=True) if given == answer) / most
        for answer, count in votes.items()
        if count == most
    ]
    return sum(shares) / len(shares)


def majority_at_k(
    answers: Sequence[Sequence[str | None]],
    correct: Sequence[Sequence[bool]],
    k: int,
    *,
    trials: int = 400,
    seed: int = 0,
) -> Values:
    """maj@k (self-consistency, Wang et al. 2022): the chance that the majority of k samples is right.

    The mean of `majority_of` over the subsets of k of the n samples: over all of them where there are at most
    `trials`, otherwise over `trials` random ones (as the resampled trials of prm800k's evaluation, Lightman
    et al. 2023). The draws of a problem depend on `seed` and its place only.

    Args:
      answers: [P][n] final answers; None abstains.
      correct: [P][n].
      k: votes.
      trials: random subsets a problem.
      seed: of the random subsets.

    Returns:
      [P] float64.

    Raises:
      DataError: a problem has fewer than k samples.
    """
    if k < 1:
        raise DataError(f"maj@k: got k = {k}, expected >= 1.")
    values = []
    for problem, (given, right) in enumerate(zip(answers, correct, strict=True)):
        n = len(given)
        if n < k:
            raise DataError(f"maj@{k}: problem {problem} has {n} samples, expected at least {k}.")
        subsets: list[tuple[int, ...]]
        if math.comb(n, k) <= trials:
            subsets = list(itertools.combinations(range(n), k))
        else:
            rng = np.random.default_rng((seed, problem))
            subsets = [tuple(rng.choice(n, size=k, replace=False)) for _ in range(trials)]
        values.append(
            float(np.mean([majority_of([given[i] for i in s], [right[i] for i in s]) for s in subsets]))
        )
    return np.array(values, dtype=np.float64)


def exact_match(predictions: Sequence[str | None], answers: Sequence[str]) -> Values:
    """1 where a prediction equals the answer but for surrounding blanks, else 0; None never matches.

    Args:
      predictions: [P].
      answers: [P].

    Returns:
      [P] float64.
    """
    return np.array(
        [given is not None and given.strip() == answer.strip()
         for given, answer in zip(predictions, answers, strict=True)],
        dtype=np.float64,
    )  # fmt: skip


def mean_with_error(values: ArrayLike, *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean over problems with a 95% percentile bootstrap over the problems, model and samples held fixed.

    Args:
      values: [P], one number a problem.
      resamples: bootstrap samples.
      seed: of the bootstrap.

    Returns:
      The estimate. One problem has no error bar (NaN).

    Raises:
      DataError: there are no problems.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise DataError(
            f"mean over problems: got an array of shape {array.shape}, expected one value a problem."
        )
    if array.size == 1:
        return Estimate(float(array[0]), math.nan, math.nan, math.nan)
    result = stats.bootstrap(
        (array,),
        np.mean,
        n_resamples=resamples,
        batch=100,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Estimate(
        float(array.mean()), float(array.std(ddof=1) / math.sqrt(array.size)), float(low), float(high)
    )
