"""Trains one chain of stages: pretrain, fine-tune, reinforce, as the config says.

Example:
  python -m launch.train --config=experiments/quickstart.py --workdir=runs/one
  python -m launch.train --config=experiments/quickstart.py --workdir=runs/two --config.rl.objective.name=dpo

A finished stage is read, not run again; an interrupted one goes on from its newest checkpoint and ends bit for
bit where it would have ended.
"""

from rich import print as show

from launch import common
from research.config.resolve import resolve
from research.core.stages import hold_workdir
from research.train.chain import lay_ground, run_chain

common.define_config()


def main() -> None:
    """Runs what is left of the chain and prints each stage's final metrics."""
    experiment, workdir = resolve(common.config(), common.overrides()), common.workdir()
    with hold_workdir(workdir, experiment.tree):
        show(f"preparing data in {workdir / 'data'}")
        ground = lay_ground(experiment, workdir)
        for done in run_chain(experiment, workdir, ground=ground):
            metrics = ", ".join(f"{key} {value:.4g}" for key, value in sorted(done.result["metrics"].items()))
            show(
                f"[bold]{done.stage.name}[/bold] ({done.stage.objective.name}): {metrics}\n  {done.folder.path}"
            )


if __name__ == "__main__":
    common.run(main)
