"""Programs that would hurt a host that ran them without locks: each fails, reaches nothing and leaves nothing.

Every program runs as root's child and as an ordinary user's, with namespaces and without.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from research.rewards.sandbox.sandbox import Outcome
from tests.research.rewards.sandbox.hostile import EXHAUSTING, PREAMBLE, Attack
from tests.research.rewards.sandbox.hostile_reaching import REACHING
from tests.research.rewards.sandbox.left import processes_with

ATTACKS = (*EXHAUSTING, *REACHING)
MARK = f"HOSTILE_TEST_{os.getpid()}"  # in the text of every program, to find what is left of it


def name(attack: Attack) -> str:
    return f"{attack.kind}-{attack.name}"


def run_all(attacks, *, namespaces: bool, tree: Path, interpreter: str, user: dict) -> dict:
    jobs = [
        {"codes": [f"# {MARK}\n{PREAMBLE}{code}" for code in (each.code, each.look) if code], "limits": each.limits}
        for each in attacks
    ]
    done = subprocess.run(
        [interpreter, "-B", str(tree / "runner.py"), str(int(namespaces))],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        cwd="/",
        env={"PYTHONPATH": str(tree), "API_TOKEN": "hunter2"},
        **user,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def results(namespaces, tree, interpreter, user) -> dict:
    attacks = [each for each in ATTACKS if namespaces or not each.namespaces]
    found = run_all(attacks, namespaces=namespaces, tree=tree, interpreter=interpreter, user=user)
    outcomes = {
        each: [Outcome(*outcome) for outcome in outcomes]
        for each, outcomes in zip(map(name, attacks), found["outcomes"], strict=True)
    }
    return {"outcomes": outcomes, "host": found["host"]}


@pytest.mark.parametrize("attack", ATTACKS, ids=name)
def test_reaches_nothing(attack, results):
    if name(attack) not in results["outcomes"]:
        pytest.skip("without namespaces, a program may read what the user may read")
    first, *later = results["outcomes"][name(attack)]
    for outcome in (first, *later):
        assert "REACHED" not in outcome.output
    if attack.ended == "fails":
        assert first.ended == "exit" and first.status != 0
    else:
        assert first.ended == attack.ended
    for outcome in later:
        assert (outcome.ended, outcome.status) == ("exit", 0)


def test_the_host_is_as_it_was(results):
    assert results["host"] == {"file": "hunter2", "folder": ["secret"], "host_key": True, "planted_keys": []}
    assert not processes_with(MARK)
