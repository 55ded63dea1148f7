"""Test-time compute: accuracy against the samples drawn, and the tokens spent, of each way to choose an answer.

M samples of each problem are drawn once; all else follows from them. Each strategy answers from N <= M samples:

- `pass`: right where any sample is: coverage, the ceiling of every way to choose (Chen et al. 2021, unbiased).
- `random`: one of the N, chosen blindly: the control that spends as much.
- `majority`: the most frequent answer (self-consistency, Wang et al. 2022).
- `best_of_n:<scorer>`: the sample that the scorer likes best (Cobbe et al. 2021; Lightman et al. 2023).
- `weighted:<scorer>`: the answer with the largest sum of the scorer's weights (Li et al. 2023).

The accuracy is the expectation over subsets of N of the M samples: exact for `pass`, `random` and `best_of_n`; for
votes exact where there are no more subsets than trials, else the mean over the trials. Ties are broken by a fair
draw. Two error bars, which answer different questions:

- **over draws**: the spread of the whole set's accuracy when each problem is answered from one draw of N of its M
  samples (the resampled trials of prm800k's evaluation): would the same problems give the same number again? It
  narrows as N nears M, where draws share samples, and is 0 at N = M, where there is one draw (`random` picks one of
  it blindly, and keeps its spread).
- **over problems**: bootstrap of the problems, samples held fixed: would other problems give it?

P problems, M samples each.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from research.core.errors import DataError
from research.evals.draws import Values, pick, shuffles, subsets, vote
from research.evals.passk import Estimate, best_of_n, check_scores, check_weights, mean_with_error, pass_at_k

PASS, RANDOM, MAJORITY, BEST, WEIGHTED = "pass", "random", "majority", "best_of_n", "weighted"
STRATEGIES = (PASS, RANDOM, MAJORITY, BEST, WEIGHTED)


@dataclass(frozen=True)
class Spread:
    """Of the accuracy over draws: standard deviation, and the middle 95% of the trials."""

    std: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """One N of a curve.

    Attributes:
      n: samples a problem.
      accuracy: mean over the problems.
      problems: error over problems.
      draws: spread over draws of N of the M samples.
      tokens: drawn a problem, mean: the prompt once and N completions.
      scorer_tokens: that the scorer reads a problem, mean: N times prompt and completion; 0 without a scorer.
    """

    n: int
    accuracy: float
    problems: Estimate
    draws: Spread
    tokens: float
    scorer_tokens: float


@dataclass(frozen=True)
class Curve:
    """One strategy.

    Attributes:
      name: strategy, or strategy:scorer.
      points: by N, ascending.
      values: [P, len(points)], each problem's accuracy.
    """

    name: str
    points: tuple[Point, ...]
    values: Values

    @property
    def strategy(self) -> str:
        """Without the scorer."""
        return self.name.partition(":")[0]

    @property
    def scorer(self) -> str:
        """Without the strategy; "" where it has none."""
        return self.name.partition(":")[2]


@dataclass(frozen=True)
class Scaling:
    """All curves of one set of samples, by name, with what they were made of."""

    problems: int
    samples: int
    trials: int
    seed: int
    curves: Mapping[str, Curve]


def powers_of_two(largest: int) -> tuple[int, ...]:
    """1, 2, 4 ... and `largest` itself."""
    return tuple(sorted({2**power for power in range(largest.bit_length())} | {largest}))


def vote_weights(scores: ArrayLike) -> Values:
    """A Bradley-Terry reward model's scores as votes: `w_i = exp(r_i - max_j r_j)` over a problem's samples.

    Such scores have no zero, so their plain sums mean nothing. Under the model (Plackett-Luce, Luce 1959) the chance
    that sample i is preferred to all others of a draw is `exp(r_i)` over the draw's sum: an answer's votes are then
    proportional to the chance that the preferred sample gives it, and no shift of the scores changes them.

    Args:
      scores: [P, M]; -inf never votes.
    """
    found = np.asarray(scores, dtype=np.float64)
    best = found.max(axis=1, keepdims=True)
    return np.exp(found - np.where(np.isfinite(best), best, 0.0))


def scaling_curves(
    *,
    correct: ArrayLike,
    answers: Sequence[Sequence[str | None]],
    lengths: ArrayLike,
    prompt_lengths: ArrayLike,
    scores: Mapping[str, ArrayLike] | None = None,
    weights: Mapping[str, ArrayLike] | None = None,
    ns: Sequence[int] = (),
    strategies: Sequence[str] = (),
    trials: int = 400,
    seed: int = 0,
) -> Scaling:
    """Every strategy's accuracy at every N; see the module for what is exact and what the error bars mean.

    Args:
      correct: [P, M] bool.
      answers: [P][M] final answers, in one spelling per value; None abstains from votes.
      lengths: [P, M] tokens of each completion.
      prompt_lengths: [P] tokens of each prompt.
      scores: [P, M] by scorer; -inf for a sample to choose last.
      weights: [P, M] by scorer, >= 0: its votes. A scorer without them has no `weighted` curve.
      ns: each in 1..M; () takes the powers of two and M.
      strategies: of `STRATEGIES`; () takes all for which there are scores or weights.
      trials: draws a problem.
      seed: of the draws and of the bootstrap.

    Raises:
      DataError: shapes that differ, an N beyond M, a strategy unknown or without its scorer, a NaN score (named by
        scorer, problem and sample), a weight that is negative or not finite.
    """
    right, (P, M) = _table(correct)
    if len(answers) != P or any(len(given) != M for given in answers):
        raise DataError(f"answers: expected {M} for each of {P} problems, as `correct` has.")
    drawn = _nonnegative(lengths, (P, M), "lengths")
    prompts = _nonnegative(prompt_lengths, (P,), "prompt_lengths")
    scored = {name: check_scores(found, (P, M), name=name) for name, found in (scores or {}).items()}
    weighted = {
        name: check_weights(check_scores(found, (P, M), name=name), name=f"{name}: weights")
        for name, found in (weights or {}).items()
    }
    sizes = _sizes(ns, M)
    chosen = _strategies(strategies, {BEST: bool(scored), WEIGHTED: bool(weighted)})
    if trials < 1:
        raise DataError(f"trials: got {trials}, expected at least 1.")

    picks = {f"{BEST}:{name}": found for name, found in scored.items()} if BEST in chosen else {}
    votes = {MAJORITY: np.ones((P, M))} if MAJORITY in chosen else {}
    if WEIGHTED in chosen:
        votes |= {f"{WEIGHTED}:{name}": found for name, found in weighted.items()}
    exact: dict[str, Callable[[int], Values]] = {}
    if PASS in chosen:
        exact[PASS] = partial(pass_at_k, M, right.sum(axis=1))
    if RANDOM in chosen:
        exact[RANDOM] = lambda _n: right.mean(axis=1)
    exact |= {name: partial(best_of_n, found, right) for name, found in picks.items()}
    values = {name: np.stack([of(n) for n in sizes], axis=1) for name, of in exact.items()}
    values |= {name: np.zeros((P, len(sizes))) for name in votes}

    outcomes = {name: np.zeros((len(sizes), trials)) for name in values}  # accuracy of each trial
    for p in range(P):
        ranks = shuffles(M, trials, seed=seed, problem=p)
        for place, n in enumerate(sizes):
            draws = ranks < n
            found = {name: pick(draws, ranks, right[p], score[p]) for name, score in picks.items()}
            if PASS in values:
                found[PASS] = (draws & (right[p] > 0)).any(axis=1).astype(np.float64)
            if RANDOM in values:
                found[RANDOM] = right[p][ranks.argmin(axis=1)]
            for name, weight in votes.items():
                every = found[name] = vote(draws, answers[p], right[p], weight[p])
                if math.comb(M, n) <= trials:  # few enough to try them all
                    every = vote(subsets(ranks, n), answers[p], right[p], weight[p])
                values[name][p, place] = every.mean()
            for name, outcome in found.items():
                outcomes[name][place] += outcome / P

    curves = {}
    for name in sorted(values, key=lambda name: STRATEGIES.index(name.partition(":")[0])):
        points = []
        for place, n in enumerate(sizes):
            error = mean_with_error(values[name][:, place], seed=seed)
            low, high = np.percentile(outcomes[name][place], [2.5, 97.5])
            spread = Spread(float(outcomes[name][place].std()), float(low), float(high))
            tokens = float((prompts + n * drawn.mean(axis=1)).mean())
            read = float((n * (prompts + drawn.mean(axis=1))).mean()) if ":" in name else 0.0
            points.append(Point(n, error.mean, error, spread, tokens, read))
        curves[name] = Curve(name, tuple(points), values[name])
    return Scaling(P, M, trials, seed, curves)


def difference(curve: Curve, control: Curve, n: int, *, seed: int = 0) -> Estimate:
    """A strategy minus another at n samples, paired problem by problem: mean and error over problems.

    Both answer the same problems from the same samples, so this interval, not the overlap of the two strategies'
    own ones, says whether they differ.
    """
    sides = []
    for side in (curve, control):
        places = [place for place, point in enumerate(side.points) if point.n == n]
        if not places:
            raise DataError(f"{side.name}: n = {n} is not on the curve.")
        sides.append(side.values[:, places[0]])
    return mean_with_error(sides[0] - sides[1], seed=seed)


def _table(correct: ArrayLike) -> tuple[Values, tuple[int, int]]:
    right = np.asarray(correct, dtype=np.float64)
    if right.ndim != 2 or right.size == 0 or not np.isin(right, (0.0, 1.0)).all():
        raise DataError(
            f"correct: got shape {right.shape}, expected zeros and ones [problems, samples], at least one of each."
        )
    return right, (right.shape[0], right.shape[1])


def _nonnegative(given: ArrayLike, shape: tuple[int, ...], name: str) -> NDArray[np.float64]:
    found = np.asarray(given, dtype=np.float64)
    if found.shape != shape or not (np.isfinite(found) & (found >= 0)).all():
        raise DataError(f"{name}: got shape {found.shape}, expected {shape}, numbers of tokens that are not negative.")
    return found


def _sizes(ns: Sequence[int], M: int) -> tuple[int, ...]:
    sizes = tuple(sorted(set(ns))) or powers_of_two(M)
    if sizes[0] < 1 or sizes[-1] > M:
        wrong = sizes[0] if sizes[0] < 1 else sizes[-1]
        raise DataError(f"n: got {wrong}, expected 1 to {M}, the samples of a problem.")
    return sizes


def _strategies(asked: Sequence[str], scored: Mapping[str, bool]) -> tuple[str, ...]:
    """Those asked for, or all that can be had; `scored` says of each that needs a scorer whether it has one."""
    for name in asked:
        if name not in STRATEGIES:
            raise DataError(f"strategies: got {name!r}, expected some of {', '.join(STRATEGIES)}.")
        if not scored.get(name, True):
            raise DataError(f"strategies: {name} needs a scorer, got none.")
    return tuple(asked) or tuple(name for name in STRATEGIES if scored.get(name, True))
