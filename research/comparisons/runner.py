"""All systems in turn on one workload, only one computing at a time; what they did as Markdown and JSON."""

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from research.analysis import markdown
from research.comparisons.timing import Series, turns
from research.comparisons.workers import System, SystemFailed, Worker
from research.comparisons.workloads import Comparison, Workload
from research.core.files import make_folder, write_json_atomic, write_text_atomic
from research.core.progress import Progress
from research.core.versions import collect_versions

TEMPER = "temper"


class Result(NamedTuple):
    """One workload, timed: each system's series, Temper's first, and the sentence that says why one is missing."""

    name: str
    series: Mapping[str, Series]
    failures: Mapping[str, str]

    def record(self) -> dict[str, Any]:
        """Plain JSON: everything measured and everything derived."""
        systems = {
            name: {
                **each.about,
                "seconds": each.seconds,
                "tokens": each.tokens,
                "tokens_per_second": each.rate,
                "temper_over_it": self.series[TEMPER].over(each) if TEMPER in self.series else None,
            }
            for name, each in self.series.items()
        }
        return {"name": self.name, "failures": dict(self.failures), "systems": systems}

    def table(self) -> str:
        """A heading, and a column for each system."""
        columns = []
        for name, each in self.series.items():
            compared = name != TEMPER and TEMPER in self.series
            over = [f"{ratio:.2f}x" for ratio in self.series[TEMPER].over(each)] if compared else ["", ""]
            slowest, fastest = np.sort(each.rates)[[0, -1]]
            first, second = each.about["warm_up"]
            columns.append(
                {
                    "tokens/s": f"{each.rate:,.0f}",
                    "slowest .. fastest": f"{slowest:,.0f} .. {fastest:,.0f}",
                    "Temper / it": over[0],
                    "median over rounds": over[1],
                    "first run beyond second, s": f"{max(0.0, first - second):.1f}",
                    "peak memory, MiB": f"{each.about['peak_bytes'] / 2**20:,.0f}",
                }
            )
        rows = [[label, *(column[label] for column in columns)] for label in (columns[0] if columns else ())]
        rows = [row for row in rows if any(row[1:])]
        grid = markdown.table(["median of the repetitions", *self.series], rows, right_from=1)
        missing = [f"Failed: {markdown.escape(sentence)}" for sentence in self.failures.values()]
        return "\n\n".join([f"## {self.name}", grid, *missing]) + "\n"


def taking_part(workload: Workload, systems: Mapping[str, System]) -> list[System]:
    """Temper and the workload's peers that are at hand."""
    return [systems[name] for name in (TEMPER, *workload.peers) if name in systems]


def run_workload(
    comparison: Comparison, workload: Workload, systems: Sequence[System], progress: Progress, logs: Path
) -> Result:
    """Warms the systems up one after the other, then times them in turn.

    A system that fails is left out of the rest; the others go on. `progress` is advanced by one for each warm-up and
    each repetition, and told what fails; what the systems write goes to the folder `logs`.
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
            attempt(system.name, partial(worker.start, workload.message, comparison.model.num_params()))
        for repetition in range(settings.repetitions):
            for name in turns(list(workers), repetition):
                attempt(name, workers[name].run)
    return Result(workload.name, {name: worker.series() for name, worker in workers.items()}, failures)


def write(results: Sequence[Result], folder: Path, *, config: Mapping[str, Any], load: float) -> tuple[str, list[Path]]:
    """Writes `comparison.json` and `comparison.md`; returns the Markdown and the paths.

    `config` is what was asked for, `load` the machine's load average before the first repetition.
    """
    paths = [make_folder(folder) / "comparison.json", folder / "comparison.md"]
    processor = platform.processor() or platform.machine()
    record = {
        "config": dict(config),
        "machine": {"cores": os.cpu_count(), "processor": processor, "load_average_before": load},
        "versions": collect_versions(),
        "results": [result.record() for result in results],
    }
    write_json_atomic(paths[0], record)
    text = "\n".join(result.table() for result in results)
    write_text_atomic(paths[1], text)
    return text, paths
