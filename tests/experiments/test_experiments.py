"""Every experiment there is: loads without an accelerator, is what its golden text says, runs at toy size."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from research.ablation.arms import plan
from research.config.resolve import resolve
from research.train.chain import run_chain
from tests.experiments.golden import GOLDEN, ROOT, UPDATE, find_experiments, golden_text, load
from tests.experiments.toy import shrink, undescribed
from tests.research.algorithms.toy import quick_compilation

EXPERIMENTS = find_experiments()


def test_there_are_experiments() -> None:
    assert {"base", "quickstart"} <= set(EXPERIMENTS)


def test_configs_load_in_a_moment_and_without_jax() -> None:
    code = (
        "import sys, time, importlib\n"
        "import ml_collections\n"
        "for name in sys.argv[1:]:\n"
        "    start = time.process_time()\n"
        "    importlib.import_module('experiments.' + name).get_config()\n"
        "    assert time.process_time() - start < 1, name\n"
        "assert not {'jax', 'flax', 'research', 'models'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, *EXPERIMENTS], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_resolves_with_all_its_arms(name: str) -> None:
    config = load(name)
    resolve(config)
    if config.ablation.arms:
        plan(config)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_is_what_its_golden_text_says(name: str) -> None:
    path = GOLDEN / f"{name.replace('.', '/')}.txt"
    assert path.exists(), f"{path} is missing; write it with: {UPDATE}"
    found, expected = golden_text(load(name)).splitlines(), path.read_text(encoding="utf-8").splitlines()
    difference = sorted(set(found) ^ set(expected))
    assert found == expected, f"{name} changed: {difference[:6]}; if that is meant, run: {UPDATE}"


def test_no_golden_text_is_left_over() -> None:
    names = {str(path.relative_to(GOLDEN).with_suffix("")).replace("/", ".") for path in GOLDEN.rglob("*.txt")}
    assert names == set(EXPERIMENTS), f"run: {UPDATE}"


@pytest.fixture
def _quick() -> Iterator[None]:
    with quick_compilation():
        yield


# Long chains, which the quickstart or other tests run in part.
LONG = {"base", "objectives", "test_time_compute"}


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in EXPERIMENTS]
)
def test_it_survives_two_steps_at_toy_size(name: str, tmp_path: Path) -> None:
    config = shrink(load(name), tmp_path)
    finished = run_chain(resolve(config), tmp_path / "run")
    assert [done.stage.name for done in finished] == list(config.stages)
    for done in finished:
        metrics = done.metrics
        assert metrics and all(value == value for value in metrics.values()), metrics
        assert done.result["budget"]["tokens_trained"] > 0 or done.stage.online
    assert not undescribed(tmp_path / "run")
    if finished[-1].stage.samples:
        assert 0 <= finished[-1].metrics["eval/pass@1"] <= 1
