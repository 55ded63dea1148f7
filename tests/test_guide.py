"""The guide `research/algorithms/README.md`: its example, written into a copy of the tree, passes and trains."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "research" / "algorithms" / "README.md"
BLOCK = re.compile(r"`([\w/]+\.py)`:\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = dict(BLOCK.findall(GUIDE.read_text("utf-8")))

DRIVER = """
import math
import sys
from pathlib import Path

import jax
import numpy as np

from experiments import slic
from research.ablation.arms import plan
from research.core.checkpoint import restore_subtree
from research.train.chain import run_chain
from research.train.setup import set_up
from research.config.resolve import resolve
from research.core.state import abstract_params, fresh_policy
from tests.experiments.toy import shrink

jax.config.update("jax_disable_most_optimizations", True)
folder = Path(sys.argv[1])
plan(slic.get_config())
config = shrink(slic.get_config(), folder)
config.stages = ("rl",)
config.model.num_layers = 1
config.evaluation.update({"problems": 2, "samples": 1, "k": (1,), "batch_problems": 8})
config.rl.eval_problems = 2
experiment = resolve(config, ["rl.objective.slic.nll_coef=0.2"])
setup = set_up(experiment, folder)
(done,) = run_chain(experiment, folder, setup=setup)
assert done.stage.objective.name == "slic" and not done.stage.online
assert math.isfinite(done.metrics["eval/loss"]), done.metrics
model, mesh = setup.models["model"], setup.mesh
first = jax.device_get(fresh_policy(model, mesh, done.stage.seed))
second = jax.device_get(restore_subtree(done.folder.checkpoints, abstract_params(model, mesh)).arrays)
pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
assert all(not np.array_equal(a, b) and np.isfinite(b).all() for a, b in pairs)
print("trained", done.metrics["eval/loss"])
"""


def digests(folder: Path) -> dict[str, str]:
    """Of every file below the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(tree: Path, *command: str) -> str:
    """On one device, which compiles fastest."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree)}
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    done = subprocess.run([sys.executable, *command], cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


class Copy(NamedTuple):
    """A copy of the sources with the blocks of the guide added.

    Attributes:
      folder: its root.
      before: digests of its files before anything was added.
    """

    folder: Path
    before: dict[str, str]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    folder = tmp_path_factory.mktemp("tree")
    for room in ("objectives", "models", "research", "experiments", "tests"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__", "*.npz"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    before = digests(folder)
    for name, code in BLOCKS.items():
        assert name not in before, f"{name}: the guide's example must be new"
        (folder / name).write_text(code, encoding="utf-8")
    return Copy(folder, before)


def test_the_guide_is_short_and_names_the_files_of_an_objective() -> None:
    assert len(GUIDE.read_text("utf-8").splitlines()) < 120
    assert list(BLOCKS) == [
        "objectives/slic.py",
        "research/algorithms/slic.py",
        "tests/objectives/test_slic.py",
        "experiments/slic.py",
    ]


def test_the_example_is_formatted_like_the_rest(copy: Copy) -> None:
    pytest.importorskip("ruff")
    run(copy.folder, "-m", "ruff", "format", "--no-cache", "--check", *BLOCKS)
    run(copy.folder, "-m", "ruff", "check", "--no-cache", *BLOCKS)


def test_the_example_s_own_test_passes(copy: Copy) -> None:
    out = run(copy.folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/objectives/test_slic.py")
    assert "1 passed" in out or re.search(r"^\.\s+\[100%\]", out, re.MULTILINE), out


def test_it_trains_and_nothing_but_its_files_was_touched(copy: Copy, tmp_path: Path) -> None:
    assert "trained" in run(copy.folder, "-c", DRIVER, str(tmp_path))
    after = digests(copy.folder)
    assert after.keys() - copy.before.keys() == BLOCKS.keys()
    assert not [name for name, digest in copy.before.items() if after[name] != digest]
