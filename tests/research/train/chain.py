"""A chain of two stages at toy size, fine-tune and reinforce, whose policy sometimes stops and is sometimes right."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments import base
from research.config.experiment import Experiment
from research.config.resolve import resolve
from research.config.tree import merged
from research.train.chain import Finished, run_chain
from research.train.setup import Setup, set_up
from tests.experiments.toy import shrink


def chain_config(folder: Path, objective: str = "grpo") -> ConfigDict:
    """Bare answers to sums of two digits, learned for a moment; then three iterations on own samples."""
    config = base.get_config()
    config.stages = ("sft", "rl")
    config = shrink(config, folder)
    sums = {"operations": "+", "min_steps": 1, "max_steps": 1, "max_operand": 9, "train": 48, "test": 8}
    config.data.problems.arithmetic.update(sums)
    config.sft.update({"steps": 80, "batch_size": 16, "log_every": 80})
    config.sft.data.update({"transform": "terse", "terse": {"fraction": 1.0}})
    config.sft.optimizer.learning_rate = 1e-2
    config.rl.steps = 3
    config.rl.objective.name = objective
    return config


def changed(config: ConfigDict, changes: Mapping[str, Any]) -> Experiment:
    """The config with dotted keys set, resolved."""
    tree = config.to_dict()
    for key, value in changes.items():
        tree = merged(tree, key, value)
    return resolve(tree)


class Shared:
    """A working directory in which the fine-tuning is done already."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, chain_config(folder)
        self.setup: Setup = set_up(changed(self.config, {}), folder)
        run_chain(changed(self.config, {}), folder, until="sft", setup=self.setup)

    def run(self, changes: Mapping[str, Any], workdir: Path | None = None) -> Finished:
        """The last stage under these changes."""
        experiment = changed(self.config, changes)
        return run_chain(experiment, workdir or self.folder, setup=self.setup)[-1]

    def copy(self, folder: Path) -> Path:
        """Another working directory, as far."""
        for path in (self.folder / "stages").glob("sft-*"):
            shutil.copytree(path, folder / "stages" / path.name)
        return folder
