"""The benchmark command as a user meets it, at toy size."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.forks import Forks
from tests.launch.test_launch import assert_one_sentence

CONFIG = "--config=experiments/comparisons/speed.py:toy"


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as server:
        yield server


@pytest.mark.slow
def test_everything_is_timed_and_missing_peers_are_said(forks: Forks, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = forks.run("benchmark", CONFIG, f"--workdir={out}", "--config.repetitions=1")
    assert done.status == 0, done.stdout + done.stderr
    assert "trl: left out, --peers=trl=PYTHON is not given" in done.stdout
    record = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert record["versions"]["packages"]["jax"]
    assert {result["name"] for result in record["results"]} == {
        *("rollout.fixed, batch 1", "rollout.fixed, batch 4", "rollout.lengths", "rollout.greedy"),
        *("train.full", "train.ragged", "grpo.iteration"),
    }
    for result in record["results"]:
        own = result["systems"]["temper"]
        assert own["tokens_per_second"] > 0 and own["peak_bytes"] > 50e6 and own["parameters"] > 0
    assert "grpo.iteration" in done.stdout and "tokens/s" in done.stdout
    assert "Temper / it" not in done.stdout, "there is no peer to compare with"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--peers=vllm=python3",
            "--peers: got 'vllm=python3', expected NAME=PYTHON with one of transformers, trl, tunix",
        ),
        ("--peers=trl", "--peers: trl: 'nothing' is no program, expected a venv's bin/python"),
        ("--peers=trl=nowhere/python", "--peers: trl: 'nowhere/python' is no program"),
        ("--peers=trl=/", "--peers: trl: '/' is no program"),
        ("--config.repetitions=0", "repetitions: got 0, expected >= 1"),
        ("--only=fast", "--only: got 'fast', expected some of "),
    ],
)
def test_a_mistake_is_one_sentence(forks: Forks, tmp_path: Path, flag: str, message: str) -> None:
    out = tmp_path / "out"
    assert_one_sentence(forks.run("benchmark", CONFIG, f"--workdir={out}", flag), message)
    assert not out.exists()
