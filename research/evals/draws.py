"""Draws of k of a problem's n samples, and what each strategy makes of a draw.

Everything here is of one problem. S draws, n samples; a draw is a row of a mask `[S, n]`.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]
Draws = NDArray[np.bool_]

_TIE = 1e-9
"""Sums of votes that differ by less than this share of the larger one tie: the same votes, added in another order."""


def shuffles(n: int, trials: int, *, seed: int, problem: int) -> NDArray[np.int64]:
    """`[trials, n]` random rankings of the samples: `shuffles(...) < k` are draws of k without replacement.

    Draws of different k are nested, so that the curves of one trial are of one growing set of samples. A trial's
    ranking depends on (seed, problem, trial) only: neither on the other problems nor on how many trials there are.
    """
    return np.random.default_rng((seed, problem)).random((trials, n)).argsort(axis=1)


def subsets(ranks: NDArray[np.int64], k: int) -> Draws:
    """All subsets of k of the n samples where they are no more than the trials of `ranks`, otherwise these draws."""
    trials, n = ranks.shape
    if math.comb(n, k) > trials:
        return ranks < k
    chosen = np.array(list(itertools.combinations(range(n), k)))
    return (chosen[:, :, None] == np.arange(n)).any(axis=1)


def vote(draws: Draws, answers: Sequence[str | None], correct: ArrayLike, weights: ArrayLike) -> Values:
    """`[S]` the chance that the answer with the largest sum of weights is right, ties broken by a fair draw.

    The chance is over the tie-break, so no draw of it is needed: two answers that tie count half each. It is 0 for a
    draw in which all abstain.

    Args:
      answers: n final answers, in one spelling per value; None abstains.
      correct: `[n]`. Should samples of one answer differ, their share in the draw counts.
      weights: `[n]`, >= 0; ones for a plain majority.
    """
    names = list(dict.fromkeys(answer for answer in answers if answer is not None))
    if not names:
        return np.zeros(len(draws))
    ballots = np.array([[answer == name for name in names] for answer in answers], np.float64)
    each = np.stack([np.ones(len(answers)), np.asarray(correct), np.asarray(weights)]).astype(np.float64)
    members = draws.astype(np.float64)
    counts, right, sums = (members @ (ballots * column[:, None]) for column in each)
    best = sums.max(axis=1, keepdims=True)
    winners = (counts > 0) & (sums >= best * (1.0 - _TIE))
    shares = np.where(winners, right / np.maximum(counts, 1.0), 0.0).sum(axis=1)
    return shares / np.maximum(winners.sum(axis=1), 1)


def pick(draws: Draws, ranks: NDArray[np.int64], correct: ArrayLike, scores: ArrayLike) -> Values:
    """`[S]` whether the sample with the highest score is right; -inf ranks last.

    Every draw has at least one sample. Among equal scores the one drawn first (`ranks` of `shuffles`) is taken: a fair
    tie-break.
    """
    within = np.where(draws, np.asarray(scores, np.float64), -np.inf)
    tied = draws & (within == within.max(axis=1, keepdims=True))
    chosen = np.where(tied, ranks, ranks.shape[1]).argmin(axis=1)
    return np.asarray(correct, np.float64)[chosen]
