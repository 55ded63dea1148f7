"""What a run was made with: package versions, Python, platform and git revision, saved with each run."""

import contextlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "temper jax jaxlib libtpu jax-cuda12-plugin jax-cuda13-plugin flax optax orbax-checkpoint tensorstore"
    " tensorflow-datasets array_record grain sentencepiece chex ml_collections ml_dtypes numpy scipy"
)


def collect_versions() -> dict[str, Any]:
    """What can change a result: `packages` (absent ones left out), `python`, `platform`, and the state of git."""
    packages = {}
    for name in PACKAGES.split():
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    revision, dirty = git_revision(Path(__file__).resolve().parents[2])
    return {
        "packages": packages,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_revision": revision,
        "git_dirty": dirty,
    }


def git_revision(checkout: Path) -> tuple[str, bool | None]:
    """The commit of `checkout` and whether files differ from it; `("unknown", None)` where it is no checkout.

    `checkout` must be the root: a package installed inside somebody else's repository has no revision.
    """
    root, _, revision = (_git(checkout, "rev-parse", "--show-toplevel", "HEAD") or "").partition("\n")
    if not root or Path(root).resolve() != checkout.resolve():
        return "unknown", None
    return revision, bool(_git(checkout, "status", "--porcelain"))


def _git(checkout: Path, *arguments: str) -> str | None:
    """Standard output of git, or None where git is not installed or refuses."""
    try:
        done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
