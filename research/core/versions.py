"""What a run was made with: package versions, Python, platform and git revision, saved with each run."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "temper",
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorstore",
    "tensorflow-datasets",
    "array_record",
    "grain",
    "sentencepiece",
    "chex",
    "ml_collections",
    "ml_dtypes",
    "numpy",
    "scipy",
)


def collect_versions(checkout: Path | None = None) -> dict[str, Any]:
    """The versions that can change a result.

    Args:
      checkout: root of the git checkout to ask; by default the one this file is in.

    Returns:
      `packages` (name to version, absent ones left out), `python`, `platform`, `git_revision` ("unknown"
      outside a checkout) and `git_dirty` (uncommitted changes; None where the revision is unknown).
    """
    revision, dirty = git_revision(checkout or Path(__file__).resolve().parent.parent)
    return {
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_revision": revision,
        "git_dirty": dirty,
    }


def git_revision(checkout: Path) -> tuple[str, bool | None]:
    """The commit of `checkout` and whether files differ from it; `("unknown", None)` where it is no checkout.

    `checkout` must be the root: a package installed inside somebody else's repository has no revision.
    """
    root = _git(checkout, "rev-parse", "--show-toplevel")
    if root is None or Path(root).resolve() != checkout.resolve():
        return "unknown", None
    revision = _git(checkout, "rev-parse", "HEAD")
    if revision is None:  # a repository without a commit
        return "unknown", None
    return revision, bool(_git(checkout, "status", "--porcelain"))


def _git(checkout: Path, *arguments: str) -> str | None:
    """Standard output of git, or None where git is not installed or refuses."""
    try:
        done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
