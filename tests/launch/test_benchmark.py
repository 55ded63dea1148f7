"""The benchmark command as a user meets it, at toy size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.forks import ROOT

TOY_ROWS = 24


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "80"}
    command = [sys.executable, "-m", "launch.benchmark", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def timed(kind: str, workdir: Path, *arguments: str) -> tuple[dict[str, dict], str]:
    """The JSON's results by name, and what was printed."""
    config = f"--config=experiments/benchmarks/{kind}.py:toy"
    done = launch(config, f"--workdir={workdir}", "--config.repetitions=1", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((workdir / f"{kind}.json").read_text(encoding="utf-8"))
    assert record["config"]["kind"] == kind and record["versions"]["packages"]["jax"]
    for result in record["results"]:
        own = result["systems"]["temper"]
        assert own["tokens_per_second"] > 0 and own["peak_bytes"] > 50e6 and own["compile_seconds"] > 0
        assert own["parameters"] > 0 and 0 < own["shares"]["limit"] < 1.5
        assert result["limits"]["flops"] > 1e8 and result["limits"]["bandwidth"] > 1e7
    return {result["name"]: result for result in record["results"]}, done.stdout


@pytest.mark.slow
def test_an_iteration_of_grpo_is_timed_and_the_missing_peer_is_said(tmp_path: Path) -> None:
    results, printed = timed("grpo_iteration", tmp_path / "out")
    assert set(results) == {"iteration"}
    assert "trl: left out, --peers=trl=PYTHON is not given" in printed
    assert "seconds per iteration" in printed and "share of the limit" in printed
    assert max(len(line) for line in printed.splitlines() if line[:1] in "┏│└") <= 80


@pytest.mark.slow
def test_rollouts_are_timed_with_a_plot(tmp_path: Path) -> None:
    results, _ = timed("rollout", tmp_path)
    assert set(results) == {"fixed, batch 1", "fixed, batch 4", "lengths", "greedy"}
    assert (tmp_path / "rollout_fixed.png").read_bytes().startswith(b"\x89PNG")
    assert results["lengths"]["systems"]["temper"]["tokens"] == [sum_of_lengths()]


def sum_of_lengths() -> float:
    from research.benchmarks.workloads import draw_lengths

    return float(draw_lengths(8, 4, 16, seed=0).sum())


@pytest.mark.slow
def test_training_steps_are_timed_on_rows_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i}+1", "completion": f"{'so ' * (i % 7)}{i + 1}"} for i in range(TOY_ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    results, _ = timed(
        *("train_step", tmp_path / "out", f"--config.data.problems.path={path}"),
        *("--config.data.problems.validation_one_in=5", "--config.cases.ragged.examples=8"),
    )
    assert set(results) == {"full", "ragged"}
    assert results["full"]["systems"]["temper"]["tokens"] == [2 * 2 * 16]
    ragged = results["ragged"]["systems"]["temper"]["tokens"][0]
    assert 0 < ragged < 2 * 64 * 8  # real tokens, not slots


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--peers=vllm=python3",),
            "--peers: got 'vllm=python3', expected NAME=PYTHON with one of transformers",
        ),
        (("--peers=trl=nowhere/python",), "--peers: trl: 'nowhere/python' is no program"),
        (("--config.repetitions=0",), "repetitions: got 0, expected at least 1"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = launch("--config=experiments/benchmarks/rollout.py:toy", f"--workdir={tmp_path}", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "rollout.json").exists()
