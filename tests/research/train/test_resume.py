"""A run that is stopped at random moments, by whatever signal, ends bit for bit where the uninterrupted run ends."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from research.train.stored import load_policy

ROOT = Path(__file__).resolve().parents[3]


def start(workdir: Path, cache: Path, steps: int) -> subprocess.Popen:
    """Starts or resumes the run of `tests.tiny` on one device."""
    env = {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "tests.tiny", str(workdir), str(steps)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def rl_folder(workdir: Path) -> Path:
    (folder,) = (workdir / "stages").glob("rl-*")
    return folder


def fingerprint(workdir: Path) -> dict[str, str]:
    """Digests of everything that must not depend on having been killed."""
    folder = rl_folder(workdir)
    found = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("metrics.jsonl", "samples.jsonl")
    }
    policy = load_policy(folder)
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(policy.params)):
        found[jax.tree_util.keystr(path)] = hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()
    return found


def wait_until_it_moves(process: subprocess.Popen, log: Path) -> bool:
    """Waits for the run to write a metric; False if it ends first."""
    before = log.read_bytes() if log.exists() else b""
    while process.poll() is None:
        if log.exists() and log.read_bytes() != before:
            return True
        time.sleep(0.005)
    return False


def kill_and_resume(
    tmp_path: Path, kills: int, steps: int, signals: tuple[signal.Signals, ...] = (signal.SIGKILL,)
) -> None:
    """Sends the signals in turn, each to a process that has logged a step."""
    cache, whole, killed = tmp_path / "cache", tmp_path / "whole", tmp_path / "killed"
    process = start(whole, cache, steps)
    assert process.wait() == 0, process.stderr.read().decode()[-2000:]
    # The stages before are shared, so that all kills fall into the RL loop.
    shutil.copytree(whole / "data", killed / "data")
    for stage in (whole / "stages").iterdir():
        if not stage.name.startswith("rl-"):
            shutil.copytree(stage, killed / "stages" / stage.name)
    rng = random.Random(0)
    name, done = rl_folder(whole).name, 0
    for attempt in range(10 * kills):
        process = start(killed, cache, steps)
        if done < kills:
            if wait_until_it_moves(process, killed / "stages" / name / "metrics.jsonl"):
                time.sleep(rng.uniform(0.0, 0.3))
            if process.poll() is None:
                number = signals[done % len(signals)]
                process.send_signal(number)
                assert process.wait() in (-number, 128 + number, 0), process.stderr.read().decode()[-2000:]
                done += 1
                continue
        assert process.wait() == 0, process.stderr.read().decode()[-2000:]
        if (killed / "stages" / name / "done.json").exists():
            break
        assert attempt < 10 * kills - 1, "the run never ended"
    assert done == kills, f"the run ended after {done} of {kills} kills; make it longer"
    assert fingerprint(killed) == fingerprint(whole)


@pytest.mark.slow
def test_a_kill(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, kills=1, steps=12)


@pytest.mark.slow
def test_ten_kills(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, kills=10, steps=60)


@pytest.mark.slow
def test_ten_interrupts(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, kills=10, steps=60, signals=(signal.SIGINT, signal.SIGTERM, signal.SIGKILL))
