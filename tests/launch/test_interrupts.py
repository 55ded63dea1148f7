"""SIGINT and SIGTERM: what is done is saved, one sentence says how to go on, and the end is that of a whole run."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from research.analysis.results import load_results
from research.train.stored import load_policy
from tests.launch.forks import ROOT, Forks, Outcome

TOY = """
from pathlib import Path
from experiments import quickstart
from tests.experiments.toy import shrink

def get_config(arg=""):
    config = shrink(quickstart.get_config(), Path({folder!r}))
    config.stages = ("sft", "rl") if arg == "chain" else ("sft",)
    config.sft.update({{"steps": 60, "log_every": 1, "eval_every": 25}})
    config.rl.update({{"steps": 12, "log_every": 1, "eval_every": 5}})
    if arg != "chain":
        config.evaluation.evaluators = ()
        config.ablation = {{"stage": "sft", "metric": "eval/loss", "seeds": (0,), "seed_keys": ("sft.seed",)}}
        config.ablation.arms = {{"a": (), "b": ("sft.optimizer.learning_rate=0.01",)}}
    return config
"""


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("cache")) as server:
        yield server


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    (folder / "toy.py").write_text(TOY.format(folder=str(folder)), encoding="utf-8")
    return folder / "toy.py"


def assert_stopped(outcome: Outcome, number: signal.Signals, message: str) -> None:
    """The status of the signal; what was asked and what came of it, in a line each."""
    assert outcome.status == 128 + number, outcome
    assert "Traceback" not in outcome.stdout + outcome.stderr
    lines = [line for line in outcome.stderr.splitlines() if line.strip()]
    assert len(lines) <= 2 and lines[-1].startswith(f"{number.name}: "), lines
    assert re.search(message, lines[-1]), lines


def fingerprint(workdir: Path) -> dict[str, str]:
    """Digests of all that must not depend on having been interrupted."""
    found = {}
    for folder in sorted((workdir / "stages").iterdir()):
        for name in ("metrics.jsonl", "samples.jsonl"):
            found[f"{folder.name}/{name}"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(load_policy(folder).params))
        for path, leaf in leaves:
            key = f"{folder.name}{jax.tree_util.keystr(path)}"
            found[key] = hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()
        done = json.loads((folder / "done.json").read_text("utf-8"))
        found[f"{folder.name}/done"] = json.dumps([done["metrics"], done["curve"], done["note"]])
    return found


def test_interrupted_in_both_stages_and_resumed_it_ends_as_a_whole_run(
    forks: Forks, config: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = ("train", f"--config={config}:chain")
    assert forks.run(*command, f"--workdir={whole}").status == 0
    sft, rl = cut / "stages" / "sft-*" / "metrics.jsonl", cut / "stages" / "rl-*" / "metrics.jsonl"
    outcome = forks.run(*command, f"--workdir={cut}", signals=[(signal.SIGINT, sft, 20)])
    assert_stopped(outcome, signal.SIGINT, r"sft \(sft\): saved at step \d+ of 60; the same command goes on from there")
    outcome = forks.run(*command, f"--workdir={cut}", signals=[(signal.SIGTERM, rl, 4)])
    assert re.search(r"sft \(sft\): resuming from step \d+ of 60", outcome.stdout), outcome.stdout
    assert_stopped(outcome, signal.SIGTERM, r"rl \(grpo\): saved at step \d+ of 12")
    outcome = forks.run(*command, f"--workdir={cut}")
    assert outcome.status == 0, outcome.stderr
    assert "sft: finished, read from" in outcome.stdout and "rl (grpo): resuming from step" in outcome.stdout
    assert fingerprint(cut) == fingerprint(whole)
    again = forks.run(*command, f"--workdir={cut}")
    assert again.status == 0 and again.stdout.count("evaluation read from") == 2


def test_an_interrupted_ablation_records_no_failure_and_is_repaired_by_the_same_command(
    forks: Forks, config: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    command = ("ablate", f"--config={config}", f"--workdir={workdir}")
    second = workdir / "stages" / "sft-b-s0-*" / "metrics.jsonl"
    outcome = forks.run(*command, signals=[(signal.SIGTERM, second, 5)])
    assert_stopped(outcome, signal.SIGTERM, r"b-s0: sft \(sft\): saved at step \d+ of 60")
    assert [(r.arm, r.status) for r in load_results(workdir / "results.json")] == [("a", "finished")]
    assert not (workdir / "failures").exists()
    outcome = forks.run(*command)
    assert outcome.status == 0, outcome.stderr
    results = load_results(workdir / "results.json")
    assert [(r.arm, r.status) for r in results] == [("a", "finished"), ("b", "finished")]
    assert {Path(r.run_dir).name.rsplit("-", 1)[0] for r in results} == {"sft-a-s0", "sft-b-s0"}
    assert all("eval/loss" in r.metrics and "eval/pass@1" not in r.metrics for r in results)
    assert (workdir / "report" / "report.md").exists()


@pytest.mark.slow
def test_an_ablation_killed_ten_times_ends_as_a_whole_one(forks: Forks, config: Path, tmp_path: Path) -> None:
    """By SIGKILL, at ten moments of its two arms; each attempt goes on from the newest checkpoint."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = ("ablate", f"--config={config}", "--config.sft.checkpoint_every=1e-9")
    assert forks.run(*command, f"--workdir={whole}").status == 0
    for arm in ("a", "b"):
        for lines in (3, 14, 25, 41, 58):
            log = cut / "stages" / f"sft-{arm}-s0-*" / "metrics.jsonl"
            assert forks.run(*command, f"--workdir={cut}", signals=[(signal.SIGKILL, log, lines)]).status == -9
    assert forks.run(*command, f"--workdir={cut}").status == 0
    assert fingerprint(cut) == fingerprint(whole)
    compared = [[(r.arm, r.status, r.metrics) for r in load_results(w / "results.json")] for w in (whole, cut)]
    assert compared[0] == compared[1] and len(compared[0]) == 2


def test_a_second_signal_ends_at_once(forks: Forks, config: Path, tmp_path: Path) -> None:
    metrics = tmp_path / "stages" / "sft-*" / "metrics.jsonl"
    signals = [(signal.SIGINT, metrics, 3), (signal.SIGINT, metrics, 3)]
    outcome = forks.run("train", f"--config={config}", f"--workdir={tmp_path}", signals=signals)
    assert outcome.status == 130 and "Traceback" not in outcome.stderr
    assert forks.run("train", f"--config={config}", f"--workdir={tmp_path}").status == 0


@pytest.mark.parametrize("seconds", [0.6, 1.5, pytest.param(3.0, marks=pytest.mark.slow)])
def test_ctrl_c_while_a_command_imports_is_one_sentence(seconds: float, tmp_path: Path) -> None:
    """A process of its own, at whatever it does by then; nothing is swallowed and nothing is a traceback."""
    command = [sys.executable, "-m", "launch.train", "--config=experiments/quickstart.py", f"--workdir={tmp_path}"]
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1].startswith("SIGINT: interrupted") and "Traceback" not in errors, errors
