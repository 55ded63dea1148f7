"""From configs to workloads: sizes, lengths, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments.benchmarks import grpo_iteration, rollout, train_step
from experiments.benchmarks.base import SIZES
from research.benchmarks.spec import read_benchmark
from research.benchmarks.workloads import FIRST_ID, draw_lengths, make_workloads
from research.core.errors import ConfigError
from tests.experiments.golden import find_experiments

CONFIGS = {"rollout": rollout, "train_step": train_step, "grpo_iteration": grpo_iteration}


def silent(_: str) -> None:
    """Says nothing."""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_benchmark_of_every_size_is_well_formed(kind: str, size: str, tmp_path: Path) -> None:
    config = CONFIGS[kind].get_config(size)
    assert config.is_locked and config.kind == kind
    benchmark = read_benchmark(config)
    for workload in make_workloads(benchmark, tmp_path, silent):
        assert workload.phases and workload.unit_tokens > 0 and workload.read_bytes > 0
        assert json.loads(json.dumps(workload.message)) == workload.message
        assert size != "gpu" or not workload.peers


def test_the_default_is_the_cpu_size_with_7_million_parameters() -> None:
    benchmark = read_benchmark(rollout.get_config())
    assert benchmark.model.num_params() == pytest.approx(7.2e6, rel=0.01)
    assert read_benchmark(rollout.get_config("gpu")).model.num_params() == pytest.approx(1.24e9, rel=0.01)


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match="rollout: got the argument 'huge', expected one of cpu, gpu, toy"):
        rollout.get_config("huge")


def test_benchmarks_are_no_chains_of_stages() -> None:
    assert not [name for name in find_experiments() if name.startswith("benchmarks")]


def test_batch_sizes_become_a_curve_of_the_same_lengths(tmp_path: Path) -> None:
    workloads = make_workloads(read_benchmark(rollout.get_config()), tmp_path, silent)
    fixed = [work for work in workloads if work.case == "fixed"]
    assert [work.batch_size for work in fixed] == [1, 4, 16, 64, 256]
    assert [len(work.message["prompts"]) for work in fixed] == [1, 4, 16, 64, 256]
    assert all(work.on_curve and set(work.message["lengths"]) == {128} for work in fixed)
    (ragged,) = (work for work in workloads if work.case == "lengths")
    lengths = np.array(ragged.message["lengths"])
    assert len(lengths) == 256 and ragged.message["batch_size"] == 64 and not ragged.on_curve
    assert lengths.mean() == pytest.approx(32, abs=0.5) and lengths.max() > 96
    prompts = np.array(ragged.message["prompts"])
    assert prompts.shape == (256, 32) and prompts.min() >= FIRST_ID and prompts.max() < 4096


@pytest.mark.parametrize(("mean", "longest"), [(32, 128), (4, 16), (128, 512)])
def test_drawn_lengths_have_the_mean_that_was_asked_for(mean: int, longest: int) -> None:
    lengths = draw_lengths(256, mean, longest, seed=3)
    assert lengths.mean() == pytest.approx(mean, abs=0.5)
    assert lengths.min() >= 1 and lengths.max() <= longest and lengths.std() > mean / 2
    assert (lengths == draw_lengths(256, mean, longest, seed=3)).all()
    assert (lengths != draw_lengths(256, mean, longest, seed=4)).any()


def test_ragged_rows_need_a_file_and_are_left_out_without(tmp_path: Path) -> None:
    said: list[str] = []
    workloads = make_workloads(read_benchmark(train_step.get_config("toy")), tmp_path, said.append)
    assert [work.name for work in workloads] == ["full"]
    assert said == ["ragged: left out, --config.data.problems.path names no JSONL file"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("threads", 0, "threads: got 0, expected at least 1"),
        ("repetitions", 0, "repetitions: got 0, expected at least 1"),
        ("kind", "sampling", "kind: got 'sampling', expected one of rollout, train_step, grpo_iteration"),
        ("platform", "tpu", "platform: got 'tpu', expected cpu or gpu"),
        ("model.num_kv_heads", 4, r"model\.num_kv_heads: got 4, expected a divisor"),
        ("limits.matmul_size", 0, "limits.matmul_size: got 0"),
        ("cases.fixed.batch_sizes", (), "cases.fixed.batch_sizes: got none"),
        ("cases.fixed.batch_sizes", (4, 0), "cases.fixed.batch_sizes: got 0, expected at least 1"),
        ("cases.fixed.max_new_tokens", 0, "cases.fixed.max_new_tokens: got 0"),
        ("cases.lengths.mean_new_tokens", 9, "cases.lengths.mean_new_tokens: got 9, expected at most half"),
    ],
)
def test_bad_values_are_named(key: str, value: object, message: str) -> None:
    config = rollout.get_config("toy").unlock()
    section, _, last = key.rpartition(".")
    at = config
    for part in filter(None, section.split(".")):
        at = at[part]
    at[last] = value
    with pytest.raises(ConfigError, match=message):
        read_benchmark(config)


@pytest.mark.parametrize(
    ("section", "key"),
    [("", "seed"), ("model", "d_ff"), ("limits", "peak_flops"), ("cases.fixed", "batches")],
)
def test_unknown_and_missing_keys_are_named(section: str, key: str) -> None:
    config = rollout.get_config("toy").unlock()
    at: ConfigDict = config
    for part in filter(None, section.split(".")):
        at = at[part]
    at.surprise = 1
    prefix = f"{section}." if section else ""
    with pytest.raises(ConfigError, match=f"^{prefix}surprise: unknown config key"):
        read_benchmark(config)
    del at["surprise"]
    del at[key]
    with pytest.raises(ConfigError, match=f"^{prefix}{key}: missing config key"):
        read_benchmark(config)
