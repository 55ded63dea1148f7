"""Arms that differ in numbers only share every compiled program."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import quickstart
from research.ablation.runner import run_ablation
from research.core.compilations import CompilationCounter
from research.sampling.sampler import sample
from research.train.step import train_step
from tests.experiments.toy import shrink
from tests.research.algorithms.toy import compilations, quick_compilation


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with quick_compilation():
        yield


def test_four_arms_that_differ_in_numbers_compile_once(tmp_path: Path) -> None:
    config = shrink(quickstart.get_config(), tmp_path)
    config.stages = ("sft", "rl")
    config.rl.objective.grpo = {"beta": 0.05}  # a KL term in all arms: with 0 there is no reference
    config.ablation.control = "control"
    config.ablation.arms = {
        "control": (),
        "learning_rate": ("rl.optimizer.learning_rate=3e-3", "rl.optimizer.warmup_steps=1"),
        "beta_and_clip": ("rl.objective.grpo.beta=0.2", "rl.objective.grpo.clip_eps_high=0.3"),
        "temperature": ("rl.rollout.temperature=0.8",),
    }
    # Not the shapes of other tests, whose programs this process may hold already.
    config.rl.rollout.max_new_tokens = config.evaluation.max_new_tokens = 7
    config.sft.length = 49
    before = (train_step._cache_size(), sample._cache_size())
    with compilations() as compiled:
        results, _ = run_ablation(config, tmp_path / "run")
    assert [result.status for result in results] == ["finished"] * 4, [result.error for result in results]
    counts = Counter(compiled)
    # The SFT stage that all arms share, then one train step for the arms; rollouts and evaluations have one shape
    # here, so one sampler serves both.
    assert {name: counts[name] for name in ("train_step", "sample", "prepare_step")} == {
        "train_step": 2,
        "sample": 1,
        "prepare_step": 1,
    }
    # Of each program one entry for a fresh state and one for an updated one, whose shardings are spelled otherwise.
    assert train_step._cache_size() - before[0] <= 4
    assert sample._cache_size() - before[1] <= 2
    curves = {str(result.metrics) + str(result.curve) for result in results}
    folders = {result.run_dir for result in results}
    assert len(folders) == 4 and curves


def test_the_counter_sees_each_new_program_once_while_it_is_open() -> None:
    def program(x: jax.Array) -> jax.Array:
        return 3 * x + 1

    jitted, small, large = jax.jit(program), np.ones(3), np.ones(4)
    with CompilationCounter() as counter:
        counts = []
        for x in (small, small, large, large):
            jax.block_until_ready(jitted(x))
            counts.append(counter.count)
    assert counts == [1, 1, 2, 2]
    jitted(np.ones(5))
    assert counter.count == 2
