"""Test-time compute: accuracy against the samples drawn, and the tokens spent, of each way to choose an answer.

M samples of each problem are drawn once; all else follows from them. Each strategy answers from N <= M samples:

- `pass`: right where any sample is: coverage, the ceiling of every way to choose (Chen et al. 2021, unbiased).
- `random`: one of the N, chosen blindly: the control that spends as much.
- `majority`: the most frequent answer (self-consistency, Wang et al. 2022).
- `best_of_n:<scorer>`: the sample that the scorer likes best (Cobbe et al. 2021; Lightman et al. 2023).
- `weighted:<scorer>`: the answer with the largest sum of the scorer's weights (Li et al. 2023).

The accuracy is the expectation over subsets of N of the M samples: exact for `pass`, `random` and `best_of_n`; for
votes exact where there are no more subsets than trials, else the mean over the trials. Ties are broken by a fair
draw. There are two error bars:

- **over draws**: the spread of the whole set's accuracy when each problem is answered from one draw of N of its M
  samples (the resampled trials of prm800k's evaluation). It narrows as N nears M, where draws share samples, and is 0
  at N = M, where there is one draw (`random` picks one of it blindly, and keeps its spread).
- **over problems**: bootstrap of the problems, samples held fixed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from research.evals.draws import Values, pick, shuffles, subsets, vote
from research.evals.passk import Estimate, best_of_n, check_scores, mean_with_error, pass_at_k

PASS, RANDOM, MAJORITY, BEST, WEIGHTED = "pass", "random", "majority", "best_of_n", "weighted"


@dataclass(frozen=True)
class Spread:
    """Of the accuracy over draws: standard deviation, and the middle 95% of the trials."""

    std: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """One N of a curve: the accuracy with both of its errors, and what a problem costs, mean."""

    n: int
    accuracy: float
    problems: Estimate
    draws: Spread
    tokens: float  # drawn: the prompt once and N completions
    scorer_tokens: float  # that the scorer reads: N times prompt and completion; 0 without a scorer


@dataclass(frozen=True)
class Curve:
    """One strategy: points by N, ascending; values [P, len(points)], each problem's accuracy; scorer may be ""."""

    strategy: str
    scorer: str
    points: tuple[Point, ...]
    values: Values


@dataclass(frozen=True)
class Scaling:
    """All curves of one set of samples, by name (strategy, or strategy:scorer), with what they were made of."""

    problems: int
    samples: int
    trials: int
    seed: int
    curves: Mapping[str, Curve]


def powers_of_two(largest: int) -> tuple[int, ...]:
    """1, 2, 4 ... and `largest` itself."""
    return tuple(sorted({2**power for power in range(largest.bit_length())} | {largest}))


def scaling_curves(
    *,
    correct: ArrayLike,
    answers: Sequence[Sequence[str | None]],
    lengths: ArrayLike,
    prompt_lengths: ArrayLike,
    scores: Mapping[str, ArrayLike],
    weights: Mapping[str, ArrayLike],
    ns: Sequence[int] = (),
    trials: int = 400,
    seed: int = 0,
) -> Scaling:
    """Every strategy's accuracy at every N; see the module for what is exact and what the error bars mean.

    Args:
      correct: [P, M] bool.
      answers: [P][M] final answers, in one spelling per value; None abstains from votes.
      lengths: [P, M] tokens of each completion.
      prompt_lengths: [P] tokens of each prompt.
      scores: [P, M] by scorer; -inf for a sample to choose last. DataError for NaN.
      weights: [P, M] by scorer, >= 0: its votes.
      ns: each in 1..M, DataError otherwise; () takes the powers of two and M.
      trials: draws a problem.
      seed: of the draws and of the bootstrap.
    """
    right = np.asarray(correct, dtype=np.float64)
    P, M = right.shape
    sizes = tuple(sorted(set(ns))) or powers_of_two(M)
    prompts, drawn = np.asarray(prompt_lengths), np.asarray(lengths).mean(axis=1)
    picks = {f"{BEST}:{name}": check_scores(found, name=name) for name, found in scores.items()}
    weighted = {f"{WEIGHTED}:{name}": np.asarray(found) for name, found in weights.items()}
    votes = {MAJORITY: np.ones((P, M)), **weighted}
    names = (PASS, RANDOM, MAJORITY, *picks, *weighted)
    values = {name: np.zeros((P, len(sizes))) for name in names}
    outcomes = {name: np.zeros((len(sizes), trials)) for name in names}  # accuracy of each trial
    for place, n in enumerate(sizes):
        values[PASS][:, place] = pass_at_k(M, right.sum(axis=1), n)
        values[RANDOM][:, place] = right.mean(axis=1)
        for name, found in picks.items():
            values[name][:, place] = best_of_n(found, right, n)
    for p in range(P):
        ranks = shuffles(M, trials, seed=seed, problem=p)
        for place, n in enumerate(sizes):
            draws = ranks < n
            outcomes[PASS][place] += (draws & (right[p] > 0)).any(axis=1) / P
            outcomes[RANDOM][place] += right[p][ranks.argmin(axis=1)] / P
            for name, found in picks.items():
                outcomes[name][place] += pick(draws, ranks, right[p], found[p]) / P
            for name, found in votes.items():
                every = voted = vote(draws, answers[p], right[p], found[p])
                if math.comb(M, n) <= trials:  # few enough to try them all
                    every = vote(subsets(ranks, n), answers[p], right[p], found[p])
                values[name][p, place] = every.mean()
                outcomes[name][place] += voted / P

    def point(name: str, place: int) -> Point:
        n, outcome = sizes[place], outcomes[name][place]
        error = mean_with_error(values[name][:, place], seed=seed)
        low, high = np.percentile(outcome, [2.5, 97.5])
        spread = Spread(float(outcome.std()), float(low), float(high))
        read = float((n * (prompts + drawn)).mean()) if ":" in name else 0.0
        return Point(n, error.mean, error, spread, float((prompts + n * drawn).mean()), read)

    curves = {}
    for name in names:
        strategy, _, scorer = name.partition(":")
        curves[name] = Curve(strategy, scorer, tuple(point(name, i) for i in range(len(sizes))), values[name])
    return Scaling(P, M, trials, seed, curves)
