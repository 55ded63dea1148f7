"""Golden texts of the experiments: every key that differs from its default, so that a change shows in a review.

Write them anew with: python -m tests.experiments.golden --update
"""

import importlib
import sys
from pathlib import Path

from ml_collections import ConfigDict

from research.config.tree import flatten

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "experiments" / "golden"
UPDATE = "python -m tests.experiments.golden --update"


def find_experiments() -> list[str]:
    """Dotted names below `experiments` of all modules that have a `get_config` and are no comparison of systems."""
    paths = sorted(set((ROOT / "experiments").rglob("*.py")) - set((ROOT / "experiments/comparisons").rglob("*")))
    return [
        ".".join(path.relative_to(ROOT / "experiments").with_suffix("").parts)
        for path in paths
        if "def get_config(" in path.read_text(encoding="utf-8")
    ]


def load(name: str) -> ConfigDict:
    """The config of an experiment."""
    return importlib.import_module(f"experiments.{name}").get_config()


def golden_text(config: ConfigDict) -> str:
    """One line a key."""
    flat = flatten(config.to_dict())
    return "".join(f"{key} = {flat[key]!r}\n" for key in sorted(flat))


def main() -> None:
    """Writes all golden texts and deletes those of experiments that are gone."""
    if sys.argv[1:] != ["--update"]:
        sys.exit(f"usage: {UPDATE}")
    names = find_experiments()
    wanted = {GOLDEN / f"{name.replace('.', '/')}.txt": name for name in names}
    for path, name in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(golden_text(load(name)), encoding="utf-8")
    for path in set(GOLDEN.rglob("*.txt")) - set(wanted):
        path.unlink()
    print(f"{len(wanted)} golden texts in {GOLDEN.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
