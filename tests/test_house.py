"""The rules of the house that can be read from the sources, so that a review need not look for them."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("objectives", "models", "research", "experiments", "launch")

# What a room may import besides the standard library and itself. None: any third-party package.
THIRD_PARTY: dict[str, set[str] | None] = {
    "objectives": {"jax", "chex", "jaxtyping"},
    "models": {"flax", "jax", "jaxtyping", "numpy"},
    "research": None,
    "experiments": {"ml_collections"},
    "launch": None,
}
ROOMS_BELOW: dict[str, set[str]] = {
    "objectives": set(),
    "models": set(),
    "research": {"models", "objectives"},
    "experiments": set(),
    "launch": {"research", "models", "objectives"},
}

PEERS = Path("experiments", "comparisons", "peers")
"""Scripts that run in venvs of their own: they import the system that they drive, and each other, but no room."""

# Every entry of the checkout's root, tracked or about to be.
TOP_LEVEL = {
    *(".ci", ".github", ".gitignore", ".pre-commit-config.yaml"),
    *("README.md", "CHANGELOG.md", "LICENSE", "setup.py", "pyproject.toml"),
    *(*ROOMS, "tests"),
}


def files_of_the_checkout() -> list[Path]:
    """What git tracks or would add, so that nobody's scratch folder counts; outside a checkout, the rooms."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists():
        listed = subprocess.run(command, capture_output=True, text=True, check=True)
        paths = {ROOT / name for name in listed.stdout.split("\0") if name}
    else:
        paths = {p for room in (*ROOMS, "tests") for p in (ROOT / room).rglob("*") if "__pycache__" not in p.parts}
    return sorted(path for path in paths if path.is_file())


FILES = files_of_the_checkout()
SOURCES = [path for path in FILES if path.suffix == ".py"]


def violations_of_the_import_rule(room: str, path: Path, source: str) -> Iterator[str]:
    """Sentences about the imports in `source`, a file at `path` in `room`."""
    below, third_party, peer = ROOMS_BELOW[room], THIRD_PARTY[room], path.parent == PEERS
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""] if node.level == 0 else [room]
            if node.level and node.level >= len(path.parts):
                names = ["a relative import that leaves the room"]
        else:
            continue
        for name in names:
            top = name.split(".")[0]
            allowed = (
                (top == room and not peer)
                or top in below
                or top in sys.stdlib_module_names
                or (top not in {*ROOMS, "tests"} and (peer or third_party is None or top in third_party))
            )
            if not allowed:
                yield f"{path}:{node.lineno}: {room}/ may not import {name}"


def test_imports_point_one_way() -> None:
    found = [
        violation
        for path in SOURCES
        if (relative := path.relative_to(ROOT)).parts[0] in ROOMS
        for violation in violations_of_the_import_rule(relative.parts[0], relative, path.read_text("utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("room", "source", "allowed"),
    [
        ("objectives", "import jax.numpy as jnp, math\nfrom objectives.types import Scalar", True),
        ("objectives", "import numpy as np", False),
        ("objectives", "from models.axes import X", False),
        ("objectives", "def f():\n    from research import errors", False),
        ("models", "from flax import linen\nfrom . import axes", True),
        ("models", "import objectives", False),
        ("models", "import optax", False),
        ("models", "from ... import research", False),
        ("research", "import optax\nfrom models import axes\nfrom objectives import dpo", True),
        ("research", "from launch import train", False),
        ("research", "from experiments import base", False),
        ("research", "from tests import conftest", False),
        ("experiments", "from ml_collections import ConfigDict\nfrom experiments.base import get_config", True),
        ("experiments", "import jax", False),
        ("experiments", "from research import config", False),
        ("launch", "from research import config\nfrom absl import app", True),
        ("launch", "from experiments import base", False),
        ("launch", "import tests.conftest", False),
    ],
)
def test_the_import_rule_itself(room: str, source: str, allowed: bool) -> None:
    found = list(violations_of_the_import_rule(room, Path(room, "a.py"), source))
    assert (not found) == allowed, found


# Packages of research/: each imports only those before it. `analysis` imports `core` only, and all may import it.
ORDER = (
    *("core", "config", "data", "tasks", "rewards", "environments", "algorithms", "sampling", "evals", "rollouts"),
    *("train", "ablation", "comparisons"),
)


def violations_of_the_order(package: str, path: Path, source: str) -> Iterator[str]:
    """Sentences about the imports in `source`, a file at `path` in `research/<package>/`."""
    allowed = {"core", "analysis"} if package == "analysis" else {*ORDER[: ORDER.index(package) + 1], "analysis"}
    for node in ast.walk(ast.parse(source)):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            room, _, rest = name.partition(".")
            if room == "research" and rest.split(".")[0] not in allowed:
                yield f"{path}:{node.lineno}: research/{package}/ may not import {name}"


def test_packages_of_research_have_one_order() -> None:
    found = []
    for path in SOURCES:
        parts = path.relative_to(ROOT).parts
        if parts[0] == "research" and len(parts) > 2:
            found += violations_of_the_order(parts[1], path.relative_to(ROOT), path.read_text("utf-8"))
    assert not found, "\n".join(found)


def test_research_holds_packages_and_no_loose_files() -> None:
    parts = [path.relative_to(ROOT).parts for path in SOURCES]
    assert {p[1] for p in parts if p[0] == "research" and len(p) == 2} == {"__init__.py"}
    assert {p[1] for p in parts if p[0] == "research" and len(p) > 2} == {*ORDER, "analysis"}


@pytest.mark.parametrize(
    ("package", "source", "allowed"),
    [
        ("rewards", "from research.tasks.base import Task", True),
        ("tasks", "from research.rewards.base import score", False),
        ("evals", "def f():\n    from research.train.session import Session", False),
        ("analysis", "from research.core.metrics import load_metrics", True),
        ("analysis", "import research.config.schema", False),
        ("core", "from research.analysis.plots import draw", True),
    ],
)
def test_the_order_itself(package: str, source: str, allowed: bool) -> None:
    assert (not list(violations_of_the_order(package, Path("a.py"), source))) == allowed


def test_peers_import_the_system_they_drive_and_no_room() -> None:
    def found(source: str) -> list[str]:
        return list(violations_of_the_import_rule("experiments", PEERS / "a.py", source))

    assert not found("import torch\nfrom peers.transformers import make_llama")
    assert all(found(f"import {room}") for room in (*ROOMS, "tests"))


def test_no_source_file_is_longer_than_500_lines() -> None:
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in SOURCES}
    too_long = [f"{path.relative_to(ROOT)}: {n} lines" for path, n in lengths.items() if n > 500]
    assert not too_long, "\n".join(too_long)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"\bgetattr\(\s*(self\.)?_?(config|cfg)\b", "a config key is read by name, so that a typo is an error"),
        (r"\b(config|cfg)\.get\(", "every key has its one default, where it is declared"),
        (r"^\s*except\s*:", "a bare except swallows KeyboardInterrupt and bugs"),
    ],
)
def test_phrases_that_hide_mistakes_are_absent(pattern: str, reason: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] in ROOMS
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, reason + "\n" + "\n".join(found)


def test_no_file_names_one_machines_folders() -> None:
    pattern = re.compile("(?<![A-Za-z0-9_.])/(work|root|home/[a-z]+|Users)" + "/")
    found = []
    for path in FILES:
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # a picture or an archive
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_top_level_holds_only_what_the_architecture_lists() -> None:
    found = {path.relative_to(ROOT).parts[0] for path in FILES}
    assert found <= TOP_LEVEL, f"not in the architecture: {sorted(found - TOP_LEVEL)}"


def test_packages_are_the_rooms_and_never_the_tests() -> None:
    setuptools = pytest.importorskip("setuptools")
    call = next(
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text("utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "find_packages"
    )
    include = next(ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == "include")
    packages = setuptools.find_packages(str(ROOT), include=include)
    assert {name.split(".")[0] for name in packages} == set(ROOMS)
    folders = {path.parent.relative_to(ROOT) for path in SOURCES} - {Path(), Path("tests")}
    expected = {".".join(folder.parts) for folder in folders if folder.parts[0] in ROOMS}
    assert expected <= set(packages), f"without __init__.py: {sorted(expected - set(packages))}"


def test_every_package_that_is_imported_is_declared() -> None:
    """Import names whose distribution is called otherwise are listed; `etils`, `yaml` and such count too."""
    distribution = {
        "yaml": "PyYAML",
        "markdown_it": "markdown-it-py",
        "orbax": "orbax-checkpoint",
        "tensorflow_datasets": "tensorflow-datasets",
        "absl": "absl-py",
    }
    declared = (ROOT / "setup.py").read_text("utf-8").replace("-", "_").lower()
    missing = set()
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] not in ROOMS or path.parent == ROOT / PEERS:
            continue
        for node in ast.parse(path.read_text("utf-8")).body:  # optional packages are imported inside functions
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for top in {name.split(".")[0] for name in names} - {*ROOMS, ""} - sys.stdlib_module_names:
                name = distribution.get(top, top).replace("-", "_").lower()
                if not re.search(rf'"{name}[\[>]', declared):
                    missing.add(f"{path.relative_to(ROOT)}: {top}")
    assert not missing, "\n".join(sorted(missing))
