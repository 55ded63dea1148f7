"""From configs to workloads: every size is well formed, mistakes are named."""

import json

import numpy as np
import pytest

from experiments.comparisons import speed
from research.comparisons.workloads import FIRST_ID, Workload, read_comparison
from research.core.errors import ConfigError


def workloads(size: str, *overrides: str) -> dict[str, Workload]:
    return {work.name: work for work in read_comparison(speed.get_config(size), overrides).workloads}


@pytest.mark.parametrize("size", ["cpu", "gpu", "toy"])
def test_every_size_is_well_formed(size: str) -> None:
    found = workloads(size)
    assert {name.partition(".")[0] for name in found} == {"rollout", "train", "grpo"}
    for work in found.values():
        assert json.dumps(work.message)
        assert bool(work.peers) == (size != "gpu") and work.message["platform"] == ("gpu" if size == "gpu" else "cpu")


def test_the_models_have_7_million_and_1_billion_parameters() -> None:
    assert read_comparison(speed.get_config()).model.num_params() == pytest.approx(7.2e6, rel=0.01)
    assert read_comparison(speed.get_config("gpu")).model.num_params() == pytest.approx(1.24e9, rel=0.01)
    with pytest.raises(ValueError, match="got the argument 'huge', expected cpu, gpu or toy"):
        speed.get_config("huge")


def test_each_batch_size_is_a_workload_of_the_same_lengths() -> None:
    found = workloads("cpu")
    several = [work for name, work in found.items() if name.startswith("rollout.fixed, batch ")]
    assert [work.message["batch_size"] for work in several] == [1, 4, 16, 64, 256]
    assert [len(work.message["prompts"]) for work in several] == [1, 4, 16, 64, 256]
    assert all(set(work.message["lengths"]) == {128} for work in several)
    assert [len(found[name].message["prompts"]) for name in ("rollout.lengths", "rollout.greedy")] == [256, 8]


def test_drawn_lengths_have_the_mean_that_was_asked_for() -> None:
    found = workloads("cpu")
    work = found["rollout.lengths"]
    lengths = np.array(work.message["lengths"])
    assert work.message["batch_size"] == 64
    assert lengths.mean() == pytest.approx(32, rel=0.15) and lengths.min() >= 1 and 96 < lengths.max() <= 128
    prompts = np.array(work.message["prompts"])
    assert prompts.shape == (256, 32) and prompts.min() >= FIRST_ID and prompts.max() < 4096
    assert found == workloads("cpu") != workloads("cpu", "seed=1")


def test_examples_have_lengths_and_a_loss_on_their_ends() -> None:
    work = workloads("cpu")["train.ragged"]
    sizes = [len(each["tokens"]) for each in work.message["examples"]]
    assert len(sizes) == 256 and np.mean(sizes) == pytest.approx(180, rel=0.1)
    assert np.std(sizes) == pytest.approx(60, rel=0.2) and max(sizes) <= 512
    for each in work.message["examples"]:
        third = len(each["tokens"]) // 3
        assert each["loss_mask"] == [0] * third + [1] * (len(each["tokens"]) - third)


def test_some_cases_by_kind_or_name() -> None:
    def names(*only: str) -> list[str]:
        return sorted(work.name for work in read_comparison(speed.get_config("toy"), (), only).workloads)

    assert names("train") == ["train.full", "train.ragged"]
    assert names("greedy", "grpo.iteration") == ["grpo.iteration", "rollout.greedy"]
    assert len(names()) == 7
    with pytest.raises(ConfigError, match="--only: got 'fast', expected some of rollout.fixed, "):
        names("train", "fast")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("threads=0", "threads: got 0, expected >= 1"),
        ("platform=tpu", "platform: got 'tpu', expected one of cpu, gpu"),
        ("model.num_kv_heads=4", r"model\.num_kv_heads: got 4, expected a divisor"),
        ("rollout.fixed.batch_sizes=()", r"rollout.fixed.batch_sizes: got \(\), expected at least one"),
        ("rollout.fixed.batch_sizes=4,0", "rollout.fixed.batch_sizes: got 0, expected >= 1"),
        ("grpo.iteration.group_size=1", "grpo.iteration.group_size: got 1, expected >= 2"),
        ("repetition=3", "repetition: unknown config key; the nearest known one is repetitions"),
        ("train.full.rows=3", "train.full.rows: unknown config key"),
        ("train.fool.batch_size=3", "train.fool.batch_size: unknown config key; the nearest known one is train.full"),
    ],
)
def test_bad_values_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        read_comparison(speed.get_config("toy"), [override])
