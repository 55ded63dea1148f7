"""Configs as nested dicts of plain values: flattened, parsed against their declarations, overridden."""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from research.config.references import Component, find, provided
from research.config.schema import Effect, Key, Kind, Text, expect, keys_of, sections_of
from research.core.errors import ConfigError

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A component that a config names, with the options that it gives it."""

    component: Component
    options: Mapping[str, Any]

    def make(self) -> Any:
        """The component with its options filled in."""
        return self.component.make(self.options)

    def identity(self, facts: Any) -> Tree:
        """What it computes: its name, its source, and its options that have an effect."""
        keys = self.component.options.items()
        used = {n: self.options[n] for n, d in keys if d.used is None or d.used(self.options, facts)}
        return {"name": self.component.name, "source": self.component.source, **({"options": used} if used else {})}


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of a config, parsed.

    Attributes:
      where: its dotted path, with a dot at the end.
      value: an instance of its dataclass.
      chosen: by key, the components that the key names.
      unused: options of components that are not chosen, as the config gives them, checked.
    """

    where: str
    value: Any
    chosen: Mapping[str, tuple[Chosen, ...]]
    sections: Mapping[str, "Section"]
    unused: Tree

    def tree(self) -> Tree:
        """Every key and its value."""
        found = {name: getattr(self.value, name) for name in keys_of(type(self.value))}
        options = {each.component.name: dict(each.options) for many in self.chosen.values() for each in many}
        sections = {name: section.tree() for name, section in self.sections.items()}
        return {**found, **self.unused, **{k: v for k, v in options.items() if v}, **sections}

    def effective(self, facts: Any, effect: Effect) -> Tree:
        """The keys that have this effect, given the facts; components by what they compute."""
        found: Tree = {}
        for name, declared in self._used(facts):
            if declared.effect == effect:
                many = self.chosen.get(name)
                found[name] = getattr(self.value, name) if many is None else [c.identity(facts) for c in many]
        inner = {name: section.effective(facts, effect) for name, section in self.sections.items()}
        return found | {name: tree for name, tree in inner.items() if tree}

    def used_keys(self, facts: Any) -> set[str]:
        """Dotted keys, options of components included, that have any effect, given the facts."""
        found: set[str] = set()
        for name, _ in self._used(facts):
            found.add(f"{self.where}{name}")
            for each in self.chosen.get(name, ()):
                options = each.identity(facts).get("options", {})
                found |= {f"{self.where}{each.component.name}.{option}" for option in options}
        return found.union(*(section.used_keys(facts) for section in self.sections.values()))

    def _used(self, facts: Any) -> list[tuple[str, Key]]:
        keys = keys_of(type(self.value)).items()
        return [(n, d) for n, d in keys if d.used is None or d.used(self.value, facts)]


def to_json(tree: Tree) -> Tree:
    """The same with what JSON makes of it: tuples are lists."""
    return json.loads(json.dumps(tree))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and leaf values."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        inner = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def merged(tree: Mapping[str, Any], key: str, value: Any) -> Tree:
    """The tree with one dotted key set."""
    first, dot, rest = key.partition(".")
    if not dot:
        return {**tree, first: value}
    inner = tree.get(first, {})
    if not isinstance(inner, Mapping):
        raise ConfigError(f"{key}: {first} is a single value, expected a section")
    return {**tree, first: merged(inner, rest, value)}


def with_overrides(tree: Tree, texts: Iterable[str], where: str) -> tuple[Tree, tuple[str, ...]]:
    """The tree with "dotted.key=value" overrides in it, as `Text` that the keys' declarations read; and their keys.

    Raises:
      ConfigError: one that is malformed, or a key that is set twice.
    """
    keys: list[str] = []
    for text in texts:
        name, equals, value = text.partition("=")
        key = name.strip()
        expect(equals and key, where, text, "dotted.key=value")
        if key in keys:
            raise ConfigError(f"{where}: {key} is set twice")
        keys.append(key)
        tree = merged(tree, key, Text(value.strip()))
    return tree, tuple(keys)


def parse_section(cls: type, given: Any, where: str = "", others: Iterable[str] = ()) -> Section:
    """A section of a config against its dataclass; `others` are names within that are parsed elsewhere.

    Raises:
      ConfigError: an unknown key, a value of another type or out of bounds, a component that does not exist.
    """
    expect(isinstance(given, Mapping), where.rstrip("."), given, "a section of keys")
    declared, inner = keys_of(cls), sections_of(cls)
    values = {n: d.parse(f"{where}{n}", given[n]) if n in given else d.default for n, d in declared.items()}
    chosen: dict[str, tuple[Chosen, ...]] = {}
    for name, key in declared.items():
        if key.component is not None:
            value = values[name]
            named = value if isinstance(value, tuple) else (value,) if value or key.default else ()
            found = [find(key.component, reference, f"{where}{name}") for reference in named]
            chosen[name] = tuple(Chosen(c, _options(c, given.get(c.name, {}), where)) for c in found)
    components = {each.component.name for many in chosen.values() for each in many}
    known = {*declared, *inner, *others, *(components & given.keys())}
    kinds = [key.component for key in declared.values() if key.component is not None]
    unused = {name: _unchosen(kinds, name, given[name], where, known) for name in given if name not in known}
    sections = {name: parse_section(each, given.get(name, {}), f"{where}{name}.") for name, each in inner.items()}
    value = cls(**values, **{name: section.value for name, section in sections.items()})
    return Section(where, value, chosen, sections, unused)


def _options(component: Component, given: Any, where: str) -> Tree:
    path, options = f"{where}{component.name}", component.options
    expect(isinstance(given, Mapping), path, given, f"the options of {component.reference}")
    for name in given:
        if name not in options:
            raise unknown_key(f"{path}.{name}", [f"{path}.{known}" for known in options])
    return {n: d.parse(f"{path}.{n}", given[n]) if n in given else d.default for n, d in options.items()}


def _unchosen(kinds: Iterable[Kind], name: str, given: Any, where: str, known: Iterable[str]) -> Tree:
    """Options of a component that the config does not choose: checked all the same."""
    for kind in kinds:
        if name in provided(kind):
            options = _options(find(kind, name, f"{where}{name}"), given, where)
            return {option: options[option] for option in given}
    names = [f"{where}{each}" for each in (*known, *(n for kind in kinds for n in provided(kind)))]
    raise unknown_key(f"{where}{name}", names)


def unknown_key(key: str, known: Iterable[str]) -> ConfigError:
    """The error for a key that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)
    return ConfigError(f"{key}: unknown config key; the nearest known one is {near[0] if near else 'none'}")
