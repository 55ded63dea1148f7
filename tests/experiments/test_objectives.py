"""Every arm of `experiments/objectives.py` at toy size: its roles are loaded, and it learns something finite."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import objectives
from research.ablation.arms import Arm, plan
from research.config.experiment import Experiment
from research.config.resolve import resolve
from research.core.mesh import make_mesh
from research.train.chain import Finished, run_chain
from research.train.setup import Setup, set_up
from research.train.stored import load_policy
from tests.experiments.toy import shrink, undescribed
from tests.research.algorithms.toy import quick_compilation

# What an arm logs that no other kind of arm does: the trace of its roles.
LOGS = {
    "rejection_sampling": ("selected", "selected_fraction"),
    "dpo_given": ("reward_margin",),
    "dpo": ("pairs", "reward_margin"),
    "ppo_reward_model": ("loss/value", "reward/gold", "kl/reference"),
    "ppo": ("loss/value", "explained_variance", "kl/reference"),
    "dapo": ("dynamic_sampling/rounds", "reward/overlong"),
    "distill": ("divergence", "agreement"),
    "prm_dense": ("reward/steps",),
    "grpo": ("clip_fraction", "frac_reward_zero_std"),
}
QUICK = {"dapo"}
ARMS = {arm.name: arm for arm in plan(objectives.get_config("toy")).arms}


class Bench(NamedTuple):
    """One working directory, in which arms share their stages."""

    config: ConfigDict
    folder: Path
    setup: Setup

    def run(self, experiment: Experiment) -> list[Finished]:
        return run_chain(experiment, self.folder, until="rl", setup=self.setup)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("objectives")
    config = shrink(objectives.get_config("toy"), folder)
    config.teacher_model.update({"d_model": 48, "num_heads": 3, "num_kv_heads": 3})
    # Bare answers to sums of two digits, learned for a moment: the policy stops, and is sometimes right.
    sums = {"operations": "+", "min_steps": 1, "max_steps": 1, "train": 48, "test": 8}
    config.data.problems.arithmetic.update(sums)
    config.sft.update({"steps": 80, "batch_size": 16, "log_every": 80})
    config.sft.data.update({"transform": "terse", "terse": {"fraction": 1.0}})
    config.sft.optimizer.learning_rate = 1e-2
    with quick_compilation():
        yield Bench(config, folder, set_up(resolve(config), folder))


def check(finished: list[Finished], logs: tuple[str, ...]) -> None:
    """The last stage has learned from where its start was, its metrics are finite, its roles left their trace."""
    by_name = {done.stage.name: done for done in finished}
    done = finished[-1]
    assert done.stage.name == "rl" and set(done.stage.inputs) <= by_name.keys()
    assert done.metrics and all(map(math.isfinite, done.metrics.values()))
    lines = (done.folder.path / "metrics.jsonl").read_text("utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if not any("eval/" in key for key in record)]
    assert len(records) == 2 and set(logs) <= set().union(*records), records
    for record in records:
        assert not [key for key, value in record.items() if not math.isfinite(float(value))]
    first = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    start = load_policy(by_name[done.stage.start].folder.path)
    end = load_policy(done.folder.path, first)
    assert end.mesh.size == 1 < start.mesh.size
    before, after = jax.device_get((start.params, end.params))
    same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]
    assert not any(same), "nothing was learned"


@pytest.mark.parametrize(
    "arm", [pytest.param(arm, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, arm in ARMS.items()]
)
def test_an_arm_runs_at_toy_size(bench: Bench, arm: Arm) -> None:
    finished = bench.run(resolve(bench.config, arm.overrides))
    check(finished, LOGS.get(arm.name, ()))
    assert not undescribed(bench.folder)
    names = {done.stage.name for done in finished}
    expected = {"ppo_reward_model": "reward", "distill": "teacher_sft", "prm_dense": "prm", "prm_rerank": "prm"}
    assert {"pretrain", "sft", "rl", expected.get(arm.name, "rl")} <= names
    if arm.name == "distill":
        sizes = {done.stage.name: load_policy(done.folder.path).model.d_model for done in finished[-3:]}
        assert sizes["teacher_sft"] == 48 and sizes["rl"] == 32


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "min", "mean_minus_variance"])
def test_an_ensemble_of_reward_models_pays(bench: Bench, reduction: str) -> None:
    config = bench.config.copy_and_resolve_references()
    config.stages = ("pretrain", "sft", "reward", "reward_b", "rl")
    config.reward_b = config.reward.copy_and_resolve_references()
    config.reward_b.seed = 1
    config.rl.reward.update({"source": "model", "ensemble": reduction, "variance_coef": 0.5})
    config.rl.roles.reward = ("reward", "reward_b")
    finished = bench.run(resolve(config))
    assert {"reward", "reward_b"} <= {done.stage.name for done in finished}
    check(finished, LOGS["grpo"])


def test_arms_that_are_looked_at_closely_exist() -> None:
    assert LOGS.keys() | QUICK <= ARMS.keys()
