"""Trains one chain of stages: pretrain, fine-tune, reinforce, as the config says.

Example:
  python -m launch.train --config=experiments/quickstart.py --workdir=runs/one
  python -m launch.train --config=experiments/quickstart.py --workdir=runs/two --config.rl.objective.name=dpo

A finished stage is read, not run again; an interrupted one goes on from its newest checkpoint and ends bit for
bit where it would have ended.
"""

from launch import common, interrupts
from research.config.resolve import resolve
from research.core.progress import say
from research.core.stages import hold_workdir
from research.train.chain import run_chain
from research.train.setup import set_up

common.define_config()


def main() -> None:
    """Runs what is left of the chain and prints each stage's final metrics."""
    experiment, workdir = resolve(common.config(), common.overrides()), common.workdir()
    with hold_workdir(workdir, experiment.tree):
        say(f"preparing data in {workdir / 'data'}")
        setup = set_up(experiment, workdir)
        for done in run_chain(experiment, workdir, setup=setup, interrupts=interrupts):
            metrics = ", ".join(f"{key} {value:.4g}" for key, value in sorted(done.metrics.items()))
            say(f"{done.stage.name} ({done.stage.objective.name}): {metrics}\n  {done.folder.path}")


if __name__ == "__main__":
    common.run(main, resumes=True)
