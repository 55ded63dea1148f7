"""Drivers speak the protocol: what libraries print does not mix with answers, and peers see nothing of Temper."""

import sys
import time
from pathlib import Path

from research.comparisons.workers import System, Worker
from tests.launch.forks import ROOT

DRIVER = """
import os, time

def main(work, say):
    print("libraries print this", flush=True)
    say(parameters=7, versions={"a": "1"})
    for number in range(10):
        time.sleep(0.2 if number == 0 else 0.01)
        say(tokens=number, threads=int(os.environ["OMP_NUM_THREADS"]), cores=len(os.sched_getaffinity(0)))
"""
ALONE = """
import importlib.util

def main(work, say):
    rooms = [name for name in ("research", "models", "launch") if importlib.util.find_spec(name)]
    say(parameters=0, versions={name: "found" for name in rooms})
    while True:
        say(tokens=0)
"""


def worker(driver: str, folder: Path, *flags: str) -> Worker:
    (folder / "driver.py").write_text(driver, encoding="utf-8")
    command = (sys.executable, *flags, str(ROOT / "experiments/comparisons/protocol.py"), "driver")
    return Worker(System("fake", command, path=str(folder)), 1, 30.0, folder / "log")


def test_warm_up_is_apart_from_repetitions(tmp_path: Path) -> None:
    with worker(DRIVER, tmp_path) as fake:
        fake.start({"kind": "rollout"}, 7)
        began = time.perf_counter()
        fake.run()
        fake.run()
        found, passed = fake.series(), time.perf_counter() - began
    assert found.about["parameters"] == 7 and found.about["versions"] == {"a": "1"}
    first, second = found.about["warm_up"]
    assert first >= 0.2 and second >= 0.01 and first > second
    assert found.tokens == (2, 3) and 0.02 <= sum(found.seconds) <= passed
    assert found.about["peak_bytes"] > 1e6
    for lap in fake._laps:
        assert lap["threads"] == lap["cores"] == 1
    assert "libraries print this" in (tmp_path / "log").read_text(encoding="utf-8")


def test_a_peer_sees_nothing_of_temper(tmp_path: Path) -> None:
    """-S: without the site-packages in which the tests' Python has Temper."""
    with worker(ALONE, tmp_path, "-S") as fake:
        fake.start({}, 0)
        fake.run()
        assert fake.series().about["versions"] == {}
