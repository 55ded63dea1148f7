"""The sandbox as root and as an ordinary user start it: a copy and an interpreter that both can read."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[4]
NEEDED = (
    *("research/__init__.py", "research/core/__init__.py", "research/core/errors.py"),
    *("research/rewards/__init__.py", "research/rewards/sandbox"),
)
ORDINARY = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
"""Arguments of `subprocess.run` for a process without privileges."""


@pytest.fixture(scope="session")
def tree() -> Iterator[Path]:
    """A folder to import `research.rewards.sandbox` from, with `runner.py`."""
    with tempfile.TemporaryDirectory(prefix="sandbox-test-", dir="/tmp") as folder:
        for name in NEEDED:
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, target)
        shutil.copy(Path(__file__).with_name("runner.py"), folder)
        for path in (Path(folder), *Path(folder).rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield Path(folder)


@pytest.fixture(scope="session")
def interpreter() -> str:
    """A Python that an ordinary user can run."""
    for path in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        check = [path, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        try:
            if subprocess.run(check, cwd="/", capture_output=True, **ORDINARY).returncode == 0:
                return path
        except OSError:
            continue  # not for this user
    pytest.skip("no Python >= 3.11 here that an ordinary user can run")


@pytest.fixture(scope="module", params=["root", "ordinary"])
def user(request) -> dict[str, Any]:
    """Who runs the sandbox, as arguments of `subprocess.run`."""
    if request.param == "ordinary":
        return ORDINARY
    if os.geteuid() != 0:
        pytest.skip("needs root")
    return {}


NEW_NAMESPACES = """
import ctypes, os
libc, uid = ctypes.CDLL(None), os.geteuid()
wrong = libc.unshare(0x68020000 | (0x10000000 if uid else 0))
if uid and not wrong:
    open("/proc/self/setgroups", "w").write("deny")
    open("/proc/self/uid_map", "w").write(f"0 {uid} 1")
os._exit(bool(wrong or libc.mount(None, b"/", None, 0x44000, None) or libc.mount(b"x", b"/tmp", b"tmpfs", 0, None)))
"""


@pytest.fixture(scope="module", params=["namespaces", "best_effort"])
def namespaces(request, interpreter, user) -> bool:
    """Whether the sandbox uses namespaces; skips where the kernel has none for the user, asked without the sandbox."""
    wanted = request.param == "namespaces"
    if wanted and subprocess.run([interpreter, "-c", NEW_NAMESPACES], cwd="/", **user).returncode != 0:
        pytest.skip("the kernel gives this user no namespaces")
    return wanted
