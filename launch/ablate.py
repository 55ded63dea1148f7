"""Runs an ablation, arms x seeds, and writes its report: tables with intervals, plots, what it cost.

Example:
  python -m launch.ablate --config=experiments/quickstart.py --workdir=runs/quickstart
  python -m launch.ablate --config=experiments/quickstart.py --workdir=runs/lr \
      --config.sft.optimizer.learning_rate=3e-4

Stages shared by arms run once. A finished (arm, seed) is never run again; run the same command to go on after
an interruption.
"""

from rich import get_console

from launch import common, interrupts
from research.ablation.runner import run_ablation
from research.analysis.report import print_headline
from research.core.errors import TemperError

common.define_config()


def main() -> None:
    """Runs what is left of the ablation, prints the report; exit status 1 if a run failed."""
    results, paths = run_ablation(common.config(), common.workdir(), common.overrides(), interrupts)
    print_headline(get_console(), paths)
    failed = [f"{result.arm} seed {result.seed}" for result in results if result.status == "failed"]
    if failed:
        raise TemperError(
            f"{len(failed)} of {len(results)} runs failed ({', '.join(failed)}): see {common.workdir() / 'failures'}"
        )


if __name__ == "__main__":
    common.run(main, resumes=True)
