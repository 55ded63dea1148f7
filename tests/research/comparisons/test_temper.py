"""Temper's own repetitions: they count what they drew, learn from every example, and lower for a GPU."""

import dataclasses
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.comparisons import speed
from research.comparisons import temper
from research.comparisons.workloads import Workload, read_comparison
from research.config.optimizers import ADAMW
from research.core.mesh import make_mesh
from research.core.state import abstract_state
from research.train.step import train_step
from tests.launch.forks import ROOT
from tests.research.algorithms.toy import quick_compilation

TOY = read_comparison(speed.get_config("toy"))


def useful_tokens(work: Workload) -> int:
    """Of one repetition; drawn ones, in rollouts."""
    told = work.message
    if told["kind"] == "train":
        return told["steps"] * told["batch_size"] * told["length"]
    if told["kind"] == "grpo":
        return told["iterations"] * told["batch_size"] * told["group_size"] * told["max_new_tokens"]
    return sum(told["lengths"])


@pytest.mark.parametrize("work", [work for work in TOY.workloads if work.name != "train.ragged"], ids=lambda w: w.name)
def test_a_repetition_counts_its_tokens(work: Workload) -> None:
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with quick_compilation(), jax.set_mesh(mesh):
        parameters, run = temper.build(work.message, mesh)
        assert [run(), run()] == [useful_tokens(work)] * 2
    assert parameters == TOY.model.num_params()


def test_packed_batches_hold_every_example_whole() -> None:
    """Twelve examples of 3 to 14 tokens."""
    examples = [{"tokens": list(range(10, 13 + i)), "loss_mask": [0, 0] + [1] * (1 + i)} for i in range(12)]
    batches, steps = temper.packed({"examples": examples, "batch_size": 2, "length": 16, "seed": 0})
    assert steps == -(-sum(len(each["tokens"]) for each in examples) // (2 * 16))
    seen = set()
    for batch in islice(batches, 2 * steps):
        for tokens, segments, mask in zip(batch.tokens, batch.segment_ids, batch.loss_mask, strict=True):
            for segment in range(1, segments.max() + 1):
                at = segments == segment
                seen.add(int(at.sum()))
                assert tokens[at].tolist() == list(range(10, 10 + at.sum()))
                assert mask[at].tolist() == [False] * 2 + [True] * int(at.sum() - 2)
    assert seen == set(range(3, 15))


def test_the_gpu_training_step_lowers_for_cuda() -> None:
    """With two of its layers: lowering takes time in proportion."""
    comparison = read_comparison(speed.get_config("gpu"), only=["full"])
    (work,) = comparison.workloads
    config = dataclasses.replace(comparison.model, num_layers=2)
    algorithm, scalars = temper.objective_of("sft", 1e-3)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        state, batch = abstract_state(config, mesh, ADAMW), next(temper.full(work.message))
        traced = train_step.trace(state, batch, scalars, algorithm=algorithm, config=config)
        lowered = traced.lower(lowering_platforms=("cuda",))
    assert "bf16" in lowered.as_text()


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU")
def test_the_gpu_comparison_runs(tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if key not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    flags = ("--config=experiments/comparisons/speed.py:gpu", f"--workdir={tmp_path}")
    done = subprocess.run([sys.executable, "-m", "launch.benchmark", *flags], cwd=ROOT, env=env)
    assert done.returncode == 0
    assert "tokens/s" in (tmp_path / "comparison.md").read_text(encoding="utf-8")


def test_scalars_follow_the_workload() -> None:
    algorithm, scalars = temper.objective_of("grpo", 1e-2, 4, 8, beta=0.04)
    assert algorithm.roles == ("reference",)  # beta > 0
    assert scalars.objective["beta"] == np.float32(0.04) and scalars.objective["temperature"] == 1.0
    assert scalars.optimizer.learning_rate == np.float32(1e-2)
    assert temper.objective_of("next_token", 1e-2)[0].roles == ()
