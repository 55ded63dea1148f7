"""Temper's own laps: they count what they drew, learn from every example, and lower for a GPU."""

import dataclasses
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.benchmarks import grpo_iteration, rollout, train_step
from models.config import ModelConfig
from research.benchmarks.spec import TrainCase, read_benchmark
from research.benchmarks.systems import temper
from research.benchmarks.workloads import Workload, make_workloads
from research.config.optimizers import ADAMW
from research.core.mesh import make_mesh
from research.core.state import abstract_state, init_state
from research.train.step import train_step as update
from tests.launch.forks import ROOT


def laps(workload: Workload) -> list[dict[str, float]]:
    """Two repetitions."""
    work = workload.message
    config, mesh = ModelConfig(**work["model"]), make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        lap = temper.LAPS[work["kind"]](work, config, mesh, init_state(config, mesh, 0, ADAMW))
        return [lap(), lap()]


@pytest.mark.parametrize("case", ["fixed, batch 4", "lengths", "greedy"])
def test_a_rollout_draws_the_wanted_tokens(case: str, tmp_path: Path) -> None:
    benchmark = read_benchmark(rollout.get_config("toy"))
    (found,) = (work for work in make_workloads(benchmark, tmp_path, print) if work.name == case)
    assert [lap["tokens"] for lap in laps(found)] == [sum(found.message["lengths"])] * 2


def test_steps_and_iterations_count_their_tokens(tmp_path: Path) -> None:
    (full,) = make_workloads(read_benchmark(train_step.get_config("toy")), tmp_path, lambda _: None)
    assert [lap["tokens"] for lap in laps(full)] == [2 * 2 * 16] * 2
    (grpo,) = make_workloads(read_benchmark(grpo_iteration.get_config("toy")), tmp_path, print)
    assert [lap["tokens"] for lap in laps(grpo)] == [grpo.unit_tokens] * 2


def ragged() -> dict[str, Any]:
    """A workload of twelve examples of 3 to 14 tokens."""
    examples = [{"tokens": list(range(10, 13 + i)), "loss_mask": [0, 0] + [1] * (1 + i)} for i in range(12)]
    return {"examples": examples, "batch_size": 2, "length": 16, "seed": 0}


def test_packed_batches_hold_every_example_whole() -> None:
    work = ragged()
    batches, steps = temper.packed(work)
    total = sum(len(each["tokens"]) for each in work["examples"])
    assert steps == -(-total // (2 * 16))
    seen = set()
    for batch in islice(batches, 2 * steps):
        for tokens, segments, mask in zip(batch.tokens, batch.segment_ids, batch.loss_mask, strict=True):
            for segment in range(1, segments.max() + 1):
                at = segments == segment
                seen.add(int(at.sum()))
                assert tokens[at].tolist() == list(range(10, 10 + at.sum()))
                assert mask[at].tolist() == [False] * 2 + [True] * int(at.sum() - 2)
    assert seen == set(range(3, 15))


def gpu_model() -> ModelConfig:
    """The GPU's model with two of its layers: lowering takes time in proportion."""
    model = read_benchmark(train_step.get_config("gpu")).model
    return dataclasses.replace(model, num_layers=2)


def test_the_gpu_training_step_lowers_for_cuda() -> None:
    benchmark = read_benchmark(train_step.get_config("gpu"))
    case = benchmark.cases["full"]
    assert isinstance(case, TrainCase)
    config, mesh = gpu_model(), make_mesh(1, 1, 1, devices=jax.devices()[:1])
    work = {"optimizer": benchmark.optimizer, "batch_size": case.batch_size, "length": case.length, "seed": 0}
    algorithm, scalars = temper.objective_of(work, "sft", {"label_smoothing": 0.0, "z_loss_coef": 0.0})
    with jax.set_mesh(mesh):
        batch = next(temper.full(work, config))
        traced = update.trace(
            abstract_state(config, mesh, ADAMW), batch, scalars, algorithm=algorithm, config=config
        )
        lowered = traced.lower(lowering_platforms=("cuda",))
    assert "bf16" in lowered.as_text()


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU")
@pytest.mark.parametrize("kind", ["rollout", "train_step", "grpo_iteration"])
def test_the_gpu_benchmarks_run(kind: str, tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if key not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    config = f"--config=experiments/benchmarks/{kind}.py:gpu"
    command = [sys.executable, "-m", "launch.benchmark", config, f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "share of the limit" in done.stdout


def test_scalars_follow_the_config() -> None:
    benchmark = read_benchmark(grpo_iteration.get_config("toy"))
    work = {"optimizer": benchmark.optimizer, "group_size": 4, "max_new_tokens": 8}
    algorithm, scalars = temper.objective_of(work, "grpo", benchmark.objective, online=True)
    assert algorithm.roles == ("reference",)  # beta > 0
    assert scalars.objective["beta"] == np.float32(0.04) and scalars.objective["temperature"] == 1.0
    assert scalars.optimizer.learning_rate == np.float32(benchmark.optimizer["learning_rate"])
