"""Refusals of a config: unknown and missing keys, values out of range, overrides without effect."""

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from research.algorithms.base import Option, choice
from research.algorithms.registry import objectives
from research.config.rules import BOUNDS, CHOICES, SECTIONS
from research.core.errors import ConfigError

Tree = dict[str, Any]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and leaf values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unknown_key(key: str, known: Iterable[str]) -> ConfigError:
    """The error for a key that does not exist, with the nearest one that does."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return ConfigError(f"{key}: unknown config key; the nearest known one is {near[0] if near else 'none'}")


def check_keys(tree: Tree) -> None:
    """Refuses keys that nothing reads and names those that are missing."""
    sections = sorted(key for key, value in tree.items() if isinstance(value, dict) and "objective" in value)
    for pattern, known in SECTIONS.items():
        paths = [pattern.replace("*", stage) for stage in sections] if "*" in pattern else [pattern]
        for path in paths:
            section: Any = tree
            for part in filter(None, path.split(".")):
                section = section.get(part, {}) if isinstance(section, dict) else {}
            extra = sections if path == "" else []
            _check_section(path, section, known, extra, optional=("ablation",) if path == "" else ())
    known_objectives = objectives()
    for stage in sections:
        section = tree[stage]["objective"]
        path = f"{stage}.objective"
        _check_section(path, section, ("name", *known_objectives), [], optional=tuple(known_objectives))
        for name, options in section.items():
            if name != "name":
                _check_section(f"{path}.{name}", options, tuple(known_objectives[name].options), [])


def _check_section(
    path: str, section: Any, known: Iterable[str], extra: Iterable[str], optional: tuple[str, ...] = ()
) -> None:
    prefix = f"{path}." if path else ""
    for key in section:
        if key not in known and key not in extra:
            raise unknown_key(f"{prefix}{key}", [f"{prefix}{name}" for name in known])
    for key in known:
        if key not in section and key not in optional:
            raise ConfigError(f"{prefix}{key}: is missing, expected every key of experiments/base.py")


def check_values(flat: Tree, tree: Tree, chain: tuple[str, ...]) -> None:
    """Refuses names that do not exist and numbers out of bounds."""
    for stage in chain:
        name = flat[f"{stage}.objective.name"]
        if name not in objectives():
            raise ConfigError(
                f"{stage}.objective.name: got {name!r}, expected one of {', '.join(sorted(objectives()))}"
            )
        if name not in tree[stage]["objective"]:
            raise ConfigError(
                f"{stage}.objective.{name}: is missing, expected a section with the options "
                f"{', '.join(objectives()[name].options)}"
            )
    for pattern, choices in CHOICES.items():
        for key in _keys(pattern, chain):
            _check_value(key, flat[key], choice(*choices))
    for pattern, (low, high, why) in BOUNDS.items():
        for key in _keys(pattern, chain):
            _check_value(key, flat[key], Option(low, high, why))
    for stage in chain:
        name = flat[f"{stage}.objective.name"]
        for key, option in objectives()[name].options.items():
            _check_value(f"{stage}.objective.{name}.{key}", flat[f"{stage}.objective.{name}.{key}"], option)


def _keys(pattern: str, chain: tuple[str, ...]) -> list[str]:
    return [f"{stage}.{pattern[2:]}" for stage in chain] if pattern.startswith("*.") else [pattern]


def _check_value(key: str, value: Any, option: Option) -> None:
    if option.choices:
        if value not in option.choices:
            because = f" because {option.why}" if option.why else ""
            choices = ", ".join(map(str, option.choices))
            raise ConfigError(f"{key}: got {value!r}, expected one of {choices}{because}")
        return
    low, high = option.low, option.high
    inside = (low is None or value >= low) and (high is None or value <= high)  # false for NaN
    if not inside or value == math.inf:
        if high is None:
            limits = "expected a finite number" if low is None else f"expected >= {low:g}"
        else:
            limits = f"expected <= {high:g}" if low is None else f"expected {low:g} to {high:g}"
        raise ConfigError(f"{key}: got {value}, {limits} because {option.why}")


def refuse_overrides(overridden: Iterable[str], flat: Tree, effective: Tree, tree: Tree) -> None:
    """Refuses a key that somebody set by hand and that changes nothing."""
    headings = {"name", "question"}
    for key in overridden:
        if key.split(".")[0] == "ablation" or key in headings or key == "stages":
            continue
        if key not in flat:
            raise unknown_key(key, flat)
        if key not in effective:
            section = key.split(".")[0]
            objective = tree.get(section, {}).get("objective", {}).get("name")
            under = f"{section}.objective.name={objective}" if objective else "this config"
            raise ConfigError(f"{key}: has no effect under {under}; expected it not to be set")
