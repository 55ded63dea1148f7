"""All systems in turn on one workload after the other: only one computes at a time, and noise meets all alike."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from research.benchmarks.results import TEMPER, Result, Series
from research.benchmarks.spec import Benchmark
from research.benchmarks.work import Limits
from research.benchmarks.workers import System, SystemFailed, Worker, environment
from research.benchmarks.workloads import Workload
from research.core.progress import Progress

MACHINE = "machine"
"""The system that measures the limits; it takes its turn like the others."""


def run_benchmark(
    benchmark: Benchmark, workloads: Sequence[Workload], systems: Mapping[str, System], progress: Progress
) -> list[Result]:
    """Times every workload.

    Args:
      benchmark: repetitions, threads, pauses.
      workloads: what to time.
      systems: Temper, the machine and the peers at hand.
      progress: advanced by one for each warm-up and each repetition; also told what fails.
    """
    results = []
    for workload in workloads:
        chosen = [systems[name] for name in (TEMPER, *workload.peers, MACHINE) if name in systems]
        results.append(run_workload(benchmark, workload, chosen, progress))
    return results


def count_laps(benchmark: Benchmark, workloads: Sequence[Workload], systems: Mapping[str, System]) -> int:
    """How often `run_benchmark` advances its progress."""
    chosen = [name in systems for work in workloads for name in (TEMPER, *work.peers, MACHINE)]
    return sum(chosen) * (1 + benchmark.repetitions)


def run_workload(
    benchmark: Benchmark, workload: Workload, systems: Sequence[System], progress: Progress
) -> Result:
    """Warms the systems up one after the other, then times them in turn; the round's first changes each time.

    A system that fails is left out of the rest; the others go on.
    """
    failures: dict[str, str] = {}
    laps: dict[str, list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}

        def attempt(name: str, action: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
            try:
                return action()
            except SystemFailed as error:
                failures[name] = f"{workload.name}: {error}"
                workers.pop(name, None)
                progress.say(f"failed: {failures[name]}")
                if error.stderr:
                    progress.say(f"the end of what {name} wrote:\n{error.stderr}")
                return None
            finally:
                progress.advance(1)
                time.sleep(benchmark.settle_seconds)

        for system in systems:
            worker = Worker(system, environment(benchmark.threads), benchmark.timeout_seconds)
            workers[system.name] = stack.enter_context(worker)
            message = {
                **workload.message,
                "read_bytes": workload.read_bytes,
                "matmul_size": benchmark.limits.matmul_size,
            }
            expected = 0 if system.name == MACHINE else benchmark.model.num_params()
            attempt(system.name, partial(_warm_up, worker, message, expected))
        for repetition in range(benchmark.repetitions):
            names = list(workers)
            shift = repetition % max(len(names), 1)
            for name in names[shift:] + names[:shift]:
                lap = attempt(name, workers[name].run)
                if lap is not None:
                    laps.setdefault(name, []).append(lap)
        series = {
            name: _series(name, worker.ready, laps[name])
            for name, worker in workers.items()
            if name != MACHINE
        }
    return Result(workload, series, _limits(laps.get(MACHINE, []), MACHINE in failures), failures)


def _warm_up(worker: Worker, message: Mapping[str, Any], parameters: int) -> dict[str, Any]:
    """Warms a system up; refuses one whose model has another size."""
    ready = worker.warm_up(message)
    found = ready["parameters"]
    if abs(found - parameters) > 0.01 * parameters:
        raise SystemFailed(
            f"{worker.name}: its model has {found:,} parameters, expected {parameters:,} as Temper's", ""
        )
    return ready


def _series(name: str, ready: Mapping[str, Any], laps: Sequence[Mapping[str, Any]]) -> Series:
    return Series(
        system=name,
        seconds=tuple(lap["seconds"] for lap in laps),
        tokens=tuple(lap["tokens"] for lap in laps),
        first_seconds=ready["first_seconds"],
        second_seconds=ready["second_seconds"],
        peak_bytes=max(lap.get("device_bytes", lap["peak_bytes"]) for lap in laps),
        parameters=ready["parameters"],
        versions=ready["versions"],
    )


def _limits(laps: Sequence[Mapping[str, Any]], failed: bool) -> Limits | None:
    if failed or not laps:
        return None
    return Limits(*(float(np.median([lap[key] for lap in laps])) for key in Limits._fields))
