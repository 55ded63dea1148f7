"""Every objective that a config can name: what the modules of this package list in `OBJECTIVES`."""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import research.algorithms
from research.algorithms.base import Objective


@cache
def objectives() -> Mapping[str, Objective]:
    """Name -> objective, found by looking through `research/algorithms/`.

    Raises:
      ValueError: two modules use one name.
    """
    found: dict[str, Objective] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(research.algorithms.__path__)):
        if module in ("base", "registry"):
            continue
        listed = importlib.import_module(f"research.algorithms.{module}")
        for objective in listed.OBJECTIVES if hasattr(listed, "OBJECTIVES") else ():
            if objective.name in found:
                raise ValueError(
                    f"research/algorithms/{module}.py: objective {objective.name!r} exists already"
                )
            found[objective.name] = objective
    return MappingProxyType(found)
