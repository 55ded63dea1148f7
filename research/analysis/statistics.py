"""Statistics over seeds: what can, and what cannot, be said from a handful of runs an arm.

With three seeds no method makes the data say more than three numbers do. Two 95% intervals are given:

- the **Student-t interval** is the primary one. It is exact if seeds scatter normally, and with n = 3 rightly
  wide (4.3 standard errors to either side).
- the **percentile bootstrap** assumes no shape, but with few seeds it is too narrow: it cannot leave the
  range of the values, and its nominal 95% cover the mean of normal data 75% of the time with n = 3, 85%
  with n = 5, 90% with n = 10 (simulated). BCa is no way out: its acceleration is a third moment estimated
  from three numbers, and it degenerates where resamples coincide.

Arms are compared with the control, and with each other where asked, **seed by seed** (paired t), because runs of
one seed share initialisation and data order, and the common part of their scatter cancels. All p-values of a report
are corrected together (Holm).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from research.analysis.results import RunResult, arm_names
from research.core.errors import DataError

CONFIDENCE = 0.95
RESAMPLES = 9999
RNG_SEED = 0


@dataclass(frozen=True)
class Interval:
    """A 95% interval."""

    low: float
    high: float


@dataclass(frozen=True)
class ArmSummary:
    """One arm over its seeds; intervals and std are None where a single seed (or none) says nothing of them.

    Attributes:
      arm: its name.
      values: metric by seed, finished runs only.
      planned: runs in all.
      mean: over `values`; None if there are none.
      std: sample standard deviation (ddof 1).
      t_interval: of the mean, Student's t.
      bootstrap_interval: of the mean, percentile bootstrap.
      missing: why each run that is not in `values` is not.
      failed: whether a run has failed and none has finished.
    """

    arm: str
    values: Mapping[int, float]
    planned: int
    mean: float | None
    std: float | None
    t_interval: Interval | None
    bootstrap_interval: Interval | None
    missing: tuple[str, ...]
    failed: bool


@dataclass(frozen=True)
class PairedDifference:
    """One arm minus another over the seeds that both have finished.

    Attributes:
      arm: its name.
      against: the other's; the control's unless asked otherwise.
      differences: arm minus the other by seed.
      mean: of the differences; None if no seed is shared.
      t_interval: paired t; None with fewer than two seeds or no scatter.
      bootstrap_interval: percentile bootstrap over the seeds.
      p: two-sided paired t-test.
      p_holm: corrected over all comparisons of the report that have a p.
      note: what is unusual; "" if nothing.
    """

    arm: str
    against: str
    differences: Mapping[int, float]
    mean: float | None
    t_interval: Interval | None
    bootstrap_interval: Interval | None
    p: float | None
    p_holm: float | None
    note: str


@dataclass(frozen=True)
class Comparison:
    """All arms on one metric.

    Attributes:
      metric: its name.
      control: the control arm.
      arms: control first.
      differences: of the other arms to the control, in the same order.
      pairs: of the pairs that were asked for.
    """

    metric: str
    control: str
    arms: tuple[ArmSummary, ...]
    differences: tuple[PairedDifference, ...]
    pairs: tuple[PairedDifference, ...] = ()


def compare_arms(
    results: Sequence[RunResult], *, metric: str, control: str, pairs: Sequence[tuple[str, str]] = ()
) -> Comparison:
    """Summarises every arm and compares it with the control; compares pairs of arms too.

    Args:
      results: all runs, failed ones included.
      metric: key of `RunResult.metrics`.
      control: name of the control arm.
      pairs: (arm, other arm), the first minus the second.

    Raises:
      DataError: there is no such arm, a pair compares nothing new, a seed occurs twice, the arms were measured by
        different evaluations, or no finished run has the metric.
    """
    names = arm_names(results, control)
    finished = [result for result in results if result.status == "finished"]
    if finished and not any(metric in result.metrics for result in finished):
        known = sorted({key for result in finished for key in result.metrics})
        raise DataError(f"metric {metric!r}: no finished run has it; expected one of {known}.")
    yardsticks = {result.evaluation: result for result in finished if result.evaluation}
    if len(yardsticks) > 1:
        found = " and ".join(f"arm {r.arm!r}, seed {r.seed}" for r in list(yardsticks.values())[:2])
        raise DataError(f"{found} were measured by different evaluations, expected one for all arms.")
    _check_pairs(pairs, names, control)
    arms = {name: _summarise([result for result in results if result.arm == name], name, metric) for name in names}
    wanted = [*((name, control) for name in names if name != control), *pairs]
    raw = [_paired(arms[one], arms[other]) for one, other in wanted]
    corrected = iter(holm([difference.p for difference in raw if difference.p is not None]))
    tested = [dataclasses.replace(d, p_holm=None if d.p is None else next(corrected)) for d in raw]
    others = len(names) - 1
    return Comparison(metric, control, tuple(arms.values()), tuple(tested[:others]), tuple(tested[others:]))


def _check_pairs(pairs: Sequence[tuple[str, str]], names: Sequence[str], control: str) -> None:
    seen: set[frozenset[str]] = set()
    for pair in pairs:
        for name in pair:
            if name not in names:
                raise DataError(f"pairs: got the arm {name!r}, expected one of {list(names)}.")
        if pair[0] == pair[1] or pair[1] == control or pair[0] == control or frozenset(pair) in seen:
            raise DataError(
                f"pairs: got {pair[0]!r} against {pair[1]!r}, expected two arms, each pair once, without the "
                "control, with which every arm is compared anyway."
            )
        seen.add(frozenset(pair))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order given; SciPy has only Benjamini-Hochberg's.

    `p~_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))` over the m sorted p-values (Holm 1979).
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def t_interval(values: Sequence[float]) -> Interval | None:
    """`mean +- t_{n-1} std / sqrt(n)`; None for n < 2 or without scatter, where it would claim certainty."""
    if len(values) < 2 or _constant(values):
        return None
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    return Interval(float(low), float(high))


def bootstrap_interval(values: Sequence[float]) -> Interval | None:
    """Percentile bootstrap of the mean with a fixed generator; None for n < 2 or without scatter."""
    if len(values) < 2 or _constant(values):
        return None
    result = stats.bootstrap(
        (np.asarray(values, dtype=np.float64),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(RNG_SEED),
    )
    return Interval(float(result.confidence_interval.low), float(result.confidence_interval.high))


def _summarise(runs: Sequence[RunResult], arm: str, metric: str) -> ArmSummary:
    values: dict[int, float] = {}
    why: dict[str, list[str]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        if run.status == "failed":
            why.setdefault(f"failed: {run.error or 'no message'}", []).append(str(run.seed))
        elif metric not in run.metrics:
            why.setdefault(f"without {metric}", []).append(str(run.seed))
        elif not math.isfinite(run.metrics[metric]):
            why.setdefault(f"ended with {metric} = {run.metrics[metric]}", []).append(str(run.seed))
        else:
            values[run.seed] = float(run.metrics[metric])
    numbers = list(values.values())
    return ArmSummary(
        arm=arm,
        values=values,
        planned=len(runs),
        mean=float(np.mean(numbers)) if numbers else None,
        std=float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None,
        t_interval=t_interval(numbers),
        bootstrap_interval=bootstrap_interval(numbers),
        missing=tuple(f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)} {reason}" for reason, seeds in why.items()),
        failed=not values and any(run.status == "failed" for run in runs),
    )


def _paired(arm: ArmSummary, other: ArmSummary) -> PairedDifference:
    seeds = sorted(set(arm.values) & set(other.values))
    differences = {seed: arm.values[seed] - other.values[seed] for seed in seeds}
    numbers = list(differences.values())
    p, note = None, ""
    if not seeds:
        note = "no seed has finished in both arms"
    elif len(seeds) == 1:
        note = "one shared seed: no interval and no p-value"
    elif _constant(numbers):
        # The t statistic divides by a zero. The sign-flip test stands: 2 of the 2^n equally likely sign
        # patterns are as extreme as what was seen, or all of them if the difference is zero.
        same = math.isclose(numbers[0], 0.0, abs_tol=1e-12)
        p = 1.0 if same else 2.0 ** (1 - len(numbers))
        note = "all differences are equal: no interval; p by the exact sign-flip test"
    else:
        pairs = [arm.values[seed] for seed in seeds], [other.values[seed] for seed in seeds]
        p = float(stats.ttest_rel(*pairs).pvalue)
    if seeds and len(seeds) < max(arm.planned, other.planned):
        shared = f"compared on seeds {', '.join(map(str, seeds))} only"
        note = f"{note}; {shared}" if note else shared
    return PairedDifference(
        arm=arm.arm,
        against=other.arm,
        differences=differences,
        mean=float(np.mean(numbers)) if numbers else None,
        t_interval=t_interval(numbers),
        bootstrap_interval=bootstrap_interval(numbers),
        p=p,
        p_holm=None,
        note=note,
    )


def _constant(values: Sequence[float]) -> bool:
    """Whether the values differ by no more than rounding."""
    return float(np.ptp(values)) <= 1e-12 * max(1.0, float(np.max(np.abs(values))))
