"""What was timed, and what follows from it: medians, spreads, ratios."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from research.benchmarks.work import Limits, bandwidth_share, flop_share, limit_rate
from research.benchmarks.workloads import Workload

TEMPER = "temper"


@dataclasses.dataclass(frozen=True)
class Series:
    """One system's repetitions of one workload.

    Attributes:
      system: its name.
      seconds: of each repetition.
      tokens: useful tokens of each.
      first_seconds, second_seconds: of the two warm-up repetitions.
      peak_bytes: most memory in use, of the accelerator where there is one.
      parameters: of its model.
      versions: of its packages.
    """

    system: str
    seconds: tuple[float, ...]
    tokens: tuple[float, ...]
    first_seconds: float
    second_seconds: float
    peak_bytes: float
    parameters: int
    versions: Mapping[str, str]

    @property
    def rates(self) -> np.ndarray:
        """Tokens/s of each repetition."""
        return np.array(self.tokens) / np.array(self.seconds)

    @property
    def rate(self) -> float:
        """Median tokens/s."""
        return float(np.median(self.rates))

    @property
    def compile_seconds(self) -> float:
        """What the first repetition took beyond the second: tracing, compilation, allocation."""
        return max(0.0, self.first_seconds - self.second_seconds)


@dataclasses.dataclass(frozen=True)
class Result:
    """One workload, timed.

    Attributes:
      workload: what was done.
      series: by system, Temper first.
      limits: of the machine, medians over the same rounds; None where they could not be measured.
      failures: by system, the sentence that says why it is missing.
    """

    workload: Workload
    series: Mapping[str, Series]
    limits: Limits | None
    failures: Mapping[str, str]

    def ratios(self, peer: str) -> tuple[float, float] | None:
        """Temper's rate over a peer's: of the medians, and the median over rounds; None where one is missing."""
        if TEMPER not in self.series or peer not in self.series or peer == TEMPER:
            return None
        own, other = self.series[TEMPER], self.series[peer]
        return own.rate / other.rate, float(np.median(own.rates / other.rates))

    @property
    def limit(self) -> float | None:
        """Tokens/s that the machine's limits allow."""
        return None if self.limits is None else limit_rate(self.workload.phases, self.limits)

    def shares(self, system: str) -> dict[str, float]:
        """A system's share of the limits: `flops`, `bandwidth`, `limit`; empty where they are not known."""
        if self.limits is None:
            return {}
        rate, phases = self.series[system].rate, self.workload.phases
        return {
            "flops": flop_share(phases, rate, self.limits),
            "bandwidth": bandwidth_share(phases, rate, self.limits),
            "limit": rate / limit_rate(phases, self.limits),
        }

    def record(self) -> dict[str, Any]:
        """Plain JSON: everything measured and everything derived."""
        work = self.workload
        return {
            "name": work.name,
            "case": work.case,
            "batch_size": work.batch_size,
            "phases": [phase._asdict() for phase in work.phases],
            "limits": None if self.limits is None else self.limits._asdict(),
            "limit_tokens_per_second": self.limit,
            "unit": work.unit,
            "failures": dict(self.failures),
            "systems": {
                name: {
                    **dataclasses.asdict(each),
                    "tokens_per_second": each.rate,
                    "seconds_per_unit": work.unit_tokens / each.rate,
                    "compile_seconds": each.compile_seconds,
                    "shares": self.shares(name),
                    "temper_over_it": self.ratios(name),
                }
                for name, each in self.series.items()
            },
        }
