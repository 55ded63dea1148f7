"""All systems in turn on one workload: only one computes at a time, and noise meets all alike."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from research.comparisons.roofline import Limits, limit_rate, shares
from research.comparisons.workers import System, SystemFailed, Worker
from research.comparisons.workloads import Comparison, Workload
from research.core.progress import Progress

TEMPER, MACHINE = "temper", "machine"
"""The machine's limits are measured by a system that takes its turn like the others."""


@dataclasses.dataclass(frozen=True)
class Series:
    """One system's repetitions of one workload.

    Attributes:
      seconds, tokens: of each repetition; useful tokens.
      warm_up: seconds of the two repetitions before.
      peak_bytes: most memory in use, of the accelerator where there is one.
      parameters: of its model.
      versions: of its packages.
    """

    seconds: tuple[float, ...]
    tokens: tuple[float, ...]
    warm_up: tuple[float, ...]
    peak_bytes: float
    parameters: int
    versions: Mapping[str, str]

    @property
    def rates(self) -> np.ndarray:
        """Tokens/s of each repetition."""
        return np.divide(self.tokens, self.seconds)

    @property
    def rate(self) -> float:
        """Median tokens/s."""
        return float(np.median(self.rates))

    @property
    def compile_seconds(self) -> float:
        """What the first repetition took beyond the second: tracing, compilation, allocation."""
        return max(0.0, self.warm_up[0] - self.warm_up[1])


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

    def ratios(self, peer: str) -> tuple[float, ...]:
        """Temper's rate over a peer's: of the medians, and the median over rounds; none where one is missing."""
        if peer == TEMPER or not {TEMPER, peer} <= self.series.keys():
            return ()
        own, other = self.series[TEMPER], self.series[peer]
        return own.rate / other.rate, float(np.median(own.rates / other.rates))

    @property
    def limit(self) -> float | None:
        """Tokens/s that the machine's limits allow."""
        return None if self.limits is None else limit_rate(self.workload.cost, self.limits)

    def shares(self, system: str) -> dict[str, float]:
        """A system's share of the limits, see `roofline.shares`; empty where they are not known."""
        return {} if self.limits is None else shares(self.workload.cost, self.series[system].rate, self.limits)

    def record(self) -> dict[str, Any]:
        """Plain JSON: everything measured and everything derived."""
        return {
            **{key: value for key, value in self.workload._asdict().items() if key != "message"},
            "cost": self.workload.cost._asdict(),
            "limits": None if self.limits is None else self.limits._asdict(),
            "limit_tokens_per_second": self.limit,
            "failures": dict(self.failures),
            "systems": {
                name: {
                    **dataclasses.asdict(each),
                    "tokens_per_second": each.rate,
                    "compile_seconds": each.compile_seconds,
                    "shares": self.shares(name),
                    "temper_over_it": self.ratios(name),
                }
                for name, each in self.series.items()
            },
        }


def taking_part(workload: Workload, systems: Mapping[str, System]) -> list[System]:
    """Temper, the workload's peers that are at hand, the machine."""
    return [systems[name] for name in (TEMPER, *workload.peers, MACHINE) if name in systems]


def run_workload(
    comparison: Comparison, workload: Workload, systems: Sequence[System], progress: Progress, logs: Path
) -> Result:
    """Warms the systems up one after the other, then times them in turn; the round's first changes each time.

    A system that fails is left out of the rest; the others go on.

    Args:
      comparison: repetitions, threads, pauses, the model.
      workload: what to time.
      systems: `taking_part`.
      progress: advanced by one for each warm-up and each repetition; also told what fails.
      logs: folder of what the systems write.
    """
    settings = comparison.settings
    failures: dict[str, str] = {}
    workers: dict[str, Worker] = {}

    def attempt(name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except SystemFailed as error:
            failures[name] = f"{workload.name}: {error}"
            del workers[name]
            progress.say(f"failed: {failures[name]}")
        finally:
            progress.advance(1)
            time.sleep(settings.pause)

    with ExitStack() as stack:
        for system in systems:
            log = logs / f"{workload.name}, {system.name}.log"
            worker = stack.enter_context(Worker(system, settings.threads, settings.timeout, log))
            workers[system.name] = worker
            message = {**workload.message, "read_bytes": workload.read_bytes}
            parameters = 0 if system.name == MACHINE else comparison.model.num_params()
            attempt(system.name, partial(worker.start, message, parameters))
        for repetition in range(settings.repetitions):
            names = list(workers)
            shift = repetition % max(len(names), 1)
            for name in names[shift:] + names[:shift]:
                attempt(name, workers[name].run)
    limits = None
    if MACHINE in workers:
        laps = workers.pop(MACHINE).laps
        limits = Limits(*(float(np.median([lap[key] for lap in laps])) for key in Limits._fields))
    return Result(workload, {name: _series(worker) for name, worker in workers.items()}, limits, failures)


def _series(worker: Worker) -> Series:
    laps = worker.laps
    return Series(
        seconds=tuple(lap["seconds"] for lap in laps),
        tokens=tuple(lap["tokens"] for lap in laps),
        warm_up=worker.warm_up,
        peak_bytes=max(lap["peak_bytes"] for lap in laps),
        parameters=worker.facts["parameters"],
        versions=worker.facts["versions"],
    )
