"""Peers see the programs of `systems/` alone; the channel tells warm-up from timed repetitions."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from research.benchmarks.workers import PEERS, SYSTEMS, Worker, environment, own_system, peer_systems
from research.core.errors import ConfigError

SYSTEM = """
import time
from research.benchmarks.systems.channel import Channel

channel = Channel()
print("libraries print this", flush=True)
time.sleep(0.1)  # building is not timed
channel.describe(parameters=7, versions={"a": "1"})
for number in range(10):
    time.sleep(0.2 if number == 0 else 0.01)
    channel.lap(tokens=number)
"""


def test_a_peer_imports_the_systems_and_nothing_else_of_temper(tmp_path: Path) -> None:
    (peer,) = peer_systems([f"trl={sys.executable}"], tmp_path).values()
    assert peer.command[1:] == ("-m", "research.benchmarks.systems.trl")
    code = (
        "import research.benchmarks.systems.channel\n"
        "import importlib.util as u\n"
        "print(u.find_spec('research.config.experiment'), u.find_spec('research.benchmarks.runner'))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, '.')\n{code}"],
        cwd=peer.folder,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["None", "None"], done.stderr


def test_every_peer_has_its_program() -> None:
    assert all((SYSTEMS / f"{name}.py").exists() for name in (*PEERS, "temper", "machine"))


@pytest.mark.parametrize("name", PEERS)
def test_a_peers_program_loads_without_its_packages(name: str) -> None:
    """Only `main` imports them: what is missing is said by the peer's own Python."""
    code = f"import research.benchmarks.systems.{name}, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=SYSTEMS.parents[2], check=True)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("vllm=/bin/sh", "expected NAME=PYTHON with one of transformers, trl, tunix"),
        ("trl", "trl: 'nothing' is no program, expected a venv's bin/python"),
        ("trl=/nowhere/python", "trl: '/nowhere/python' is no program"),
        ("trl=/", "trl: '/' is no program"),
    ],
)
def test_a_bad_peer_is_one_sentence(item: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        peer_systems([item], tmp_path)


def test_the_channel_tells_warm_up_from_repetitions(tmp_path: Path) -> None:
    program = tmp_path / "system.py"
    program.write_text(SYSTEM, encoding="utf-8")
    system = own_system("temper")._replace(command=(sys.executable, "-c", SYSTEM))
    with Worker(system, environment(2), timeout=30.0) as worker:
        ready = worker.warm_up({"threads": 1, "kind": "rollout"})
        assert ready["parameters"] == 7 and ready["versions"] == {"a": "1"}
        assert 0.2 <= ready["first_seconds"] < 0.3 < 3 * ready["first_seconds"]
        assert 0.01 <= ready["second_seconds"] < 0.2
        laps = [worker.run() for _ in range(2)]
    assert [lap["tokens"] for lap in laps] == [2, 3]
    assert all(0.01 <= lap["seconds"] < 0.2 and lap["peak_bytes"] > 1e6 for lap in laps)


def test_all_systems_have_the_same_number_of_threads() -> None:
    env = environment(3)
    assert {env[key] for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC")} == {"3"}
    assert "PYTHONPATH" not in env
    assert json.dumps(env)
