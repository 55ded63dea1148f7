"""Times Temper and, where their venvs are given, the systems one would use instead, in turn in one run.

Example:
  python -m launch.benchmark --config=experiments/comparisons/speed.py --workdir=runs/speed --only=train,greedy
  python -m launch.benchmark --config=experiments/comparisons/speed.py --workdir=runs/speed \
      --peers=transformers=torchenv/bin/python,trl=torchenv/bin/python,tunix=tunixenv/bin/python

Prints medians, ratios, compile time and peak memory; writes them as Markdown and JSON. Compare only numbers of one run.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from rich import get_console
from rich.markdown import Markdown

from launch import common
from launch.common import refuse
from research.comparisons.runner import TEMPER, run_workload, taking_part, write
from research.comparisons.workers import System
from research.comparisons.workloads import read_comparison
from research.config.files import load_config
from research.config.schema import expect
from research.core.errors import TemperError
from research.core.files import make_folder
from research.core.progress import Progress

common.define_config()
_PEERS = flags.DEFINE_list("peers", [], "NAME=PYTHON of each peer's venv: transformers, trl, tunix")
_ONLY = flags.DEFINE_list("only", [], "cases or kinds of work (rollout, train, grpo); all without it")

ROOT = Path(__file__).resolve().parents[1]
COMPARISONS = ROOT / "experiments" / "comparisons"
_BUSY = 0.5
"""A load average, in cores, above which the machine is too busy to trust a time."""


def main() -> None:
    """Times, reports; exit status 1 if a system failed."""
    console = get_console()
    comparison = read_comparison(load_config(flags.FLAGS.config), common.overrides(), _ONLY.value)
    systems = {TEMPER: own_system()} | peer_systems(_PEERS.value)
    load = os.getloadavg()[0]
    if load > _BUSY:
        console.print(f"the machine is busy (load average {load:.1f}): times will scatter")
    workloads = comparison.workloads
    for name in sorted({name for work in workloads for name in work.peers} - systems.keys()):
        console.print(f"{name}: left out, --peers={name}=PYTHON is not given")
    logs = make_folder(common.workdir() / "logs")
    laps = sum(len(taking_part(work, systems)) for work in workloads) * (1 + comparison.settings.repetitions)
    try:
        with Progress("benchmark", total=laps, unit="runs") as progress:
            results = [run_workload(comparison, work, taking_part(work, systems), progress, logs) for work in workloads]
    except KeyboardInterrupt:
        raise TemperError("interrupted: nothing was written; the same command starts anew") from None
    text, paths = write(results, common.workdir(), config=comparison.tree, load=load)
    console.print(Markdown(text))
    for path in paths:
        console.print(f"wrote {path}")
    failures = [message for result in results for message in result.failures.values()]
    if failures:
        raise TemperError(f"{len(failures)} of the timings failed, the first: {failures[0]}")


def own_system() -> System:
    """Temper, in this Python; it starts as a command does."""
    driver = ("launch", f"research.comparisons.{TEMPER}")
    return System(TEMPER, (sys.executable, str(COMPARISONS / "protocol.py"), *driver), path=str(ROOT))


def peer_systems(given: Sequence[str]) -> dict[str, System]:
    """The peers of `name=path/to/python` items, modules in `experiments/comparisons/peers/`; ConfigError if unknown."""
    known = sorted(path.stem for path in (COMPARISONS / "peers").glob("[a-z]*.py"))
    found = {}
    for item in given:
        name, _, python = item.partition("=")
        expect(name in known, "--peers", item, f"NAME=PYTHON with one of {', '.join(known)}")
        runs = os.access(python, os.X_OK) and not Path(python).is_dir()
        refuse(not runs, f"--peers: {name}: {python or 'nothing'!r} is no program, expected a venv's bin/python")
        command = (str(Path(python).absolute()), str(COMPARISONS / "protocol.py"), f"peers.{name}")
        found[name] = System(name, command)
    return found


if __name__ == "__main__":
    common.run(main)
