"""Times Temper and, where their venvs are given, the systems one would pick instead, in turn in one run.

Example:
  python -m launch.benchmark --config=experiments/benchmarks/rollout.py --workdir=runs/benchmarks
  python -m launch.benchmark --config=experiments/benchmarks/train_step.py --workdir=runs/benchmarks \
      --config.data.problems.path=gsm8k_train.jsonl \
      --peers=transformers=torchenv/bin/python,trl=torchenv/bin/python,tunix=tunixenv/bin/python

Prints medians, ratios, shares of the machine's measured limits, compile time and peak memory; writes them as JSON,
and a plot where batch sizes vary. Compare only numbers of one run.
"""

import os
import tempfile
from pathlib import Path

from absl import flags
from rich import get_console

from launch import common
from research.benchmarks.report import show, write
from research.benchmarks.results import TEMPER
from research.benchmarks.runner import MACHINE, count_laps, run_benchmark
from research.benchmarks.spec import read_benchmark
from research.benchmarks.workers import own_system, peer_systems
from research.benchmarks.workloads import make_workloads
from research.config.files import load_config
from research.core.errors import TemperError
from research.core.progress import Progress

common.define_config()
_PEERS = flags.DEFINE_list("peers", [], "NAME=PYTHON of each peer's venv: transformers, trl, tunix")

_BUSY = 0.5
"""A load average, in cores, above which the machine is too busy to trust a time."""


def main() -> None:
    """Runs a benchmark and reports; exit status 1 if a system failed."""
    console = get_console()
    benchmark = read_benchmark(load_config(flags.FLAGS.config), common.overrides())
    load = os.getloadavg()[0]
    if load > _BUSY:
        console.print(f"the machine is busy (load average {load:.1f}): times will scatter")
    with tempfile.TemporaryDirectory() as folder:
        systems = {name: own_system(name) for name in (TEMPER, MACHINE)}
        systems |= peer_systems(_PEERS.value, Path(folder))
        workloads = make_workloads(benchmark, common.workdir() / "data", console.print)
        wanted = sorted({name for work in workloads for name in work.peers})
        for name in wanted:
            if name not in systems:
                console.print(f"{name}: left out, --peers={name}=PYTHON is not given")
        total = count_laps(benchmark, workloads, systems)
        try:
            with Progress(benchmark.kind, total=total, unit="runs") as progress:
                results = run_benchmark(benchmark, workloads, systems, progress)
        except KeyboardInterrupt:
            raise TemperError("interrupted: nothing was written; the same command starts anew") from None
    show(benchmark, results, console)
    for path in write(benchmark, results, common.workdir(), load):
        console.print(f"wrote {path}")
    failures = [message for result in results for message in result.failures.values()]
    if failures:
        raise TemperError(f"{len(failures)} of the timings failed, the first: {failures[0]}")


if __name__ == "__main__":
    common.run(main)
