"""The harness with systems that only sleep: whose turn it is, what a failure does, what the ratios say."""

import dataclasses
import io
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from experiments.benchmarks import rollout as rollout_config
from research.benchmarks.results import Result
from research.benchmarks.runner import count_laps, run_benchmark
from research.benchmarks.spec import Benchmark, read_benchmark
from research.benchmarks.work import Limits, Phase
from research.benchmarks.workers import System
from research.benchmarks.workloads import Workload
from research.core.progress import Progress

FAKE = Path(__file__).with_name("fake.py")
SECONDS = {"temper": 0.02, "transformers": 0.04, "tunix": 0.03, "machine": 0.01}


@pytest.fixture
def benchmark() -> Benchmark:
    config = rollout_config.get_config("toy").unlock()
    config.repetitions = 3
    config.timeout_seconds = 20.0
    return read_benchmark(config.lock())


def workload(benchmark: Benchmark, peers: tuple[str, ...] = ("transformers", "tunix")) -> Workload:
    phases = (Phase("decode", flops=1e5, read_bytes=1e4),)
    message = {"kind": "rollout", "threads": 2, "tokens": 60, "parameters": benchmark.model.num_params()}
    return Workload("fixed", "fixed", peers, 4, message, phases, 1e6, "pass", 60.0)


def systems(benchmark: Benchmark, folder: Path, **modes: str) -> dict[str, System]:
    found = {}
    for name, seconds in SECONDS.items():
        parameters = 0 if name == "machine" else benchmark.model.num_params()
        if modes.get(name) == "other":
            parameters = 2 * parameters
        arguments = (name, str(seconds), str(folder / "diary"), modes.get(name, "well"), str(parameters))
        found[name] = System(name, (sys.executable, str(FAKE), *arguments), folder)
    return found


def run(benchmark: Benchmark, folder: Path, **modes: str) -> tuple[Result, list[str], str]:
    """The result, the diary's lines, what was said on the way."""
    said = io.StringIO()
    work, chosen = [workload(benchmark)], systems(benchmark, folder, **modes)
    total = count_laps(benchmark, work, chosen)
    with Progress("rollout", total, unit="runs", console=Console(file=said, width=200)) as progress:
        (result,) = run_benchmark(benchmark, work, chosen, progress)
        if not modes:
            assert progress.done == total
    return result, (folder / "diary").read_text(encoding="utf-8").splitlines(), said.getvalue()


def test_systems_take_turns_and_only_one_works_at_a_time(benchmark: Benchmark, tmp_path: Path) -> None:
    _, diary, _ = run(benchmark, tmp_path)
    names = ["temper", "transformers", "tunix", "machine"]
    assert diary[:4] == [f"{name} warm" for name in names]
    turns = diary[4 : 4 + 2 * 3 * len(names)]
    starts, ends = turns[::2], turns[1::2]
    assert [
        line.replace("end", "start") for line in ends
    ] == starts  # nobody starts before the last has ended
    rounds = [[line.split()[0] for line in starts[i : i + 4]] for i in range(0, 12, 4)]
    assert all(sorted(each) == sorted(names) for each in rounds)
    assert len({each[0] for each in rounds}) == 3  # nobody always goes first
    assert sorted(diary[-4:]) == sorted(f"{name} bye" for name in names)  # and all were asked to end


def test_medians_ratios_limits_and_memory(benchmark: Benchmark, tmp_path: Path) -> None:
    result, _, _ = run(benchmark, tmp_path)
    own, peer = result.series["temper"], result.series["transformers"]
    assert own.seconds == pytest.approx((0.02, 0.04, 0.06))
    assert own.rate == pytest.approx(60 / 0.04)
    assert own.compile_seconds == pytest.approx(0.04) and own.peak_bytes == 3 * 1024
    assert result.ratios("transformers") == pytest.approx((2.0, 2.0))
    assert result.ratios("tunix") == pytest.approx((1.5, 1.5))
    assert result.ratios("temper") is None
    assert result.limits == Limits(1e9, 1e8)
    assert result.limit == pytest.approx(1e4)  # 1e4 tokens/s by FLOPs and by bytes
    assert result.shares("temper") == pytest.approx({"flops": 0.15, "bandwidth": 0.15, "limit": 0.15})
    assert peer.parameters == benchmark.model.num_params()


def test_a_crash_is_one_sentence_with_what_the_peer_wrote_and_the_others_go_on(
    benchmark: Benchmark, tmp_path: Path
) -> None:
    result, diary, said = run(benchmark, tmp_path, transformers="crash")
    sentence = "fixed: transformers: ended with exit status 3: RuntimeError: the wheel came off"
    assert result.failures == {"transformers": sentence}
    assert sentence in said and "loading shards" in said
    assert set(result.series) == {"temper", "tunix"}
    assert len(result.series["tunix"].seconds) == benchmark.repetitions
    assert diary.count("transformers start") == 2


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("hang", r"did not answer within 1 seconds"),
        ("chatter", r"answered 'Loading checkpoint shards: 100%', expected JSON"),
        ("other", r"its model has [\d,]+ parameters, expected [\d,]+ as Temper's"),
    ],
)
def test_other_failures_are_named_too(benchmark: Benchmark, tmp_path: Path, mode: str, message: str) -> None:
    result, _, _ = run(dataclasses.replace(benchmark, timeout_seconds=1.0), tmp_path, tunix=mode)
    assert re.search(message, result.failures["tunix"])
    assert "temper" in result.series and "tunix" not in result.series


def test_without_limits_there_are_no_shares(benchmark: Benchmark, tmp_path: Path) -> None:
    result, _, _ = run(benchmark, tmp_path, machine="crash")
    assert result.limits is None and result.limit is None and result.shares("temper") == {}
    assert result.ratios("tunix") is not None
