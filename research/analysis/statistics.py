"""Statistics over seeds: what can, and what cannot, be said from a handful of runs an arm.

With three seeds no method makes the data say more than three numbers do. Two 95% intervals are given:

- the **Student-t interval** is the primary one. It is exact if seeds scatter normally, and with n = 3 rightly wide
  (4.3 standard errors to either side).
- the **percentile bootstrap** assumes no shape, but with few seeds it is too narrow: it cannot leave the range of the
  values, and its nominal 95% cover the mean of normal data 75% of the time with n = 3, 85% with n = 5, 90% with n = 10
  (simulated). BCa is no way out: its acceleration is a third moment estimated from three numbers.

Arms are compared with the control, and with each other where asked, **seed by seed** (paired t), because runs of
one seed share initialisation and data order, and the common part of their scatter cancels. All p-values of a report
are corrected together (Holm).
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy import stats

from research.analysis.results import RunResult
from research.core.errors import DataError

CONFIDENCE = 0.95
RESAMPLES = 9999
RNG_SEED = 0


class Interval(NamedTuple):
    """A 95% interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Seeds:
    """A number for each seed, and what they say of its mean: None where there are too few."""

    arm: str
    values: Mapping[int, float]

    @cached_property
    def mean(self) -> float | None:
        """Over the seeds."""
        return float(np.mean(list(self.values.values()))) if self.values else None

    @cached_property
    def std(self) -> float | None:
        """Sample standard deviation (ddof 1)."""
        return float(np.std(list(self.values.values()), ddof=1)) if len(self.values) > 1 else None

    @cached_property
    def t_interval(self) -> Interval | None:
        """Of the mean, Student's t."""
        return t_interval(list(self.values.values()))

    @cached_property
    def bootstrap_interval(self) -> Interval | None:
        """Of the mean, percentile bootstrap."""
        return bootstrap_interval(list(self.values.values()))


@dataclass(frozen=True)
class ArmSummary(Seeds):
    """One arm's metric by seed, finished runs only."""

    planned: int  # runs in all
    missing: tuple[str, ...]  # why each run that is not in `values` is not
    failed: bool  # whether a run has failed and none has finished


@dataclass(frozen=True)
class PairedDifference(Seeds):
    """One arm minus another by seed, over the seeds that both have finished."""

    against: str  # the other arm; the control unless asked otherwise
    p: float | None  # two-sided paired t-test
    note: str  # what is unusual; "" if nothing
    p_holm: float | None = None  # corrected over all comparisons of the report that have a p


@dataclass(frozen=True)
class Comparison:
    """All arms on one metric."""

    control: str
    arms: tuple[ArmSummary, ...]  # control first
    differences: tuple[PairedDifference, ...]  # of the other arms to the control, in the same order
    pairs: tuple[PairedDifference, ...] = ()  # those that were asked for


def with_role(arm: str, control: str) -> str:
    """The arm's name, the control marked."""
    return f"{arm} (control)" if arm == control else arm


def compare_arms(
    results: Sequence[RunResult], *, metric: str, control: str, pairs: Sequence[tuple[str, str]] = ()
) -> Comparison:
    """Summarises every arm by its runs, failed ones included, and compares it with the control; `pairs` of arms too.

    DataError where there is no such arm, a pair compares nothing new, a seed occurs twice, the arms were measured by
    different evaluations, or no finished run has the metric.
    """
    names = list(dict.fromkeys(result.arm for result in results))
    if control not in names:
        raise DataError(f"control arm {control!r}: not among the results; expected one of {names}.")
    for (arm, seed), count in Counter((result.arm, result.seed) for result in results).items():
        if count > 1:
            raise DataError(f"arm {arm!r}: has two results for seed {seed}, expected one.")
    finished = [result for result in results if result.status == "finished"]
    if finished and not any(metric in result.metrics for result in finished):
        known = sorted({key for result in finished for key in result.metrics})
        raise DataError(f"metric {metric!r}: no finished run has it; expected one of {known}.")
    yardsticks = {result.evaluation: result for result in finished if result.evaluation}
    if len(yardsticks) > 1:
        found = " and ".join(f"arm {r.arm!r}, seed {r.seed}" for r in list(yardsticks.values())[:2])
        raise DataError(f"{found} were measured by different evaluations, expected one for all arms.")
    for place, pair in enumerate(pairs):
        if unknown := [name for name in pair if name not in names]:
            raise DataError(f"pairs: got the arm {unknown[0]!r}, expected one of {names}.")
        if len({*pair, control}) < 3 or set(pair) in map(set, pairs[:place]):
            raise DataError(
                f"pairs: got {pair[0]!r} against {pair[1]!r}, expected two arms, each pair once, without the "
                "control, with which every arm is compared anyway."
            )
    names = [control, *(name for name in names if name != control)]
    arms = {name: _summarise([result for result in results if result.arm == name], name, metric) for name in names}
    wanted = [*((name, control) for name in names[1:]), *pairs]
    raw = [_paired(arms[one], arms[other]) for one, other in wanted]
    corrected = iter(holm([difference.p for difference in raw if difference.p is not None]))
    tested = [dataclasses.replace(d, p_holm=None if d.p is None else next(corrected)) for d in raw]
    return Comparison(control, tuple(arms.values()), tuple(tested[: len(names) - 1]), tuple(tested[len(names) - 1 :]))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order given; SciPy has only Benjamini-Hochberg's.

    `p~_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))` over the m sorted p-values (Holm 1979).
    """
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(order))
    corrected[order] = np.maximum.accumulate(np.arange(len(order), 0, -1) * np.asarray(p_values)[order])
    return np.minimum(corrected, 1.0).tolist()


def t_interval(values: Sequence[float]) -> Interval | None:
    """`mean +- t_{n-1} std / sqrt(n)`; None for n < 2 or without scatter, where it would claim certainty."""
    if len(values) < 2 or _constant(values):
        return None
    ends = stats.t.interval(CONFIDENCE, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    return Interval(*map(float, ends))


def bootstrap_interval(values: Sequence[float]) -> Interval | None:
    """Percentile bootstrap of the mean with a fixed generator; None for n < 2 or without scatter."""
    if len(values) < 2 or _constant(values):
        return None
    data, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(RNG_SEED)
    found = stats.bootstrap(
        (data,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile", rng=rng
    )
    return Interval(*map(float, found.confidence_interval))


def _summarise(runs: Sequence[RunResult], arm: str, metric: str) -> ArmSummary:
    values: dict[int, float] = {}
    why: dict[str, list[str]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        value = run.metrics.get(metric)
        if run.status != "failed" and value is not None and math.isfinite(value):
            values[run.seed] = float(value)
            continue
        reason = f"without {metric}" if value is None else f"ended with {metric} = {value}"
        reason = f"failed: {run.error or 'no message'}" if run.status == "failed" else reason
        why.setdefault(reason, []).append(str(run.seed))
    missing = (f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)} {reason}" for reason, seeds in why.items())
    failed = not values and any(run.status == "failed" for run in runs)
    return ArmSummary(arm, values, len(runs), tuple(missing), failed)


def _paired(arm: ArmSummary, other: ArmSummary) -> PairedDifference:
    seeds = sorted(set(arm.values) & set(other.values))
    differences = {seed: arm.values[seed] - other.values[seed] for seed in seeds}
    p, notes = None, []
    if not seeds:
        notes.append("no seed has finished in both arms")
    elif len(seeds) == 1:
        notes.append("one shared seed: no interval and no p-value")
    elif _constant(list(differences.values())):
        # The t statistic divides by a zero. The sign-flip test stands: 2 of the 2^n equally likely sign
        # patterns are as extreme as what was seen, or all of them if the difference is zero.
        same = math.isclose(differences[seeds[0]], 0.0, abs_tol=1e-12)
        p = 1.0 if same else 2.0 ** (1 - len(seeds))
        notes.append("all differences are equal: no interval; p by the exact sign-flip test")
    else:
        p = float(stats.ttest_rel(*([side.values[seed] for seed in seeds] for side in (arm, other))).pvalue)
    if seeds and len(seeds) < max(arm.planned, other.planned):
        notes.append(f"compared on seeds {', '.join(map(str, seeds))} only")
    return PairedDifference(arm.arm, differences, other.arm, p, "; ".join(notes))


def _constant(values: Sequence[float]) -> bool:
    """Whether the values differ by no more than rounding."""
    return float(np.ptp(values)) <= 1e-12 * max(1.0, float(np.max(np.abs(values))))
