"""What can be said about a config's keys, from their declarations."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from research.config.references import provided
from research.config.schema import Key, keys_of, sections_of
from research.config.sections import SECTIONS, StageSection
from research.config.tree import unknown_key
from research.core.errors import ConfigError

_EFFECTS = {
    "result": "changes what is trained",
    "evaluation": "changes what is measured at the end, not what is trained",
    "speed": "changes time and memory only",
    "record": "changes only what is written down, and when",
    "report": "chooses and reports runs; changes no stage's result",
}


_STAGES = ("pretrain", "sft", "rl")
"""Names that stages have in most configs; others are as good."""


class Described(NamedTuple):
    """A key and what is known of it."""

    path: str
    key: Key

    def lines(self) -> list[str]:
        """Path, type and default; what it means; bounds and effect."""
        default = self.key.default
        head = f"{self.path} = {default!r}" + (f"  [{self.key.unit}]" if self.key.unit else "")
        found = [head, f"    {self.key.doc}"]
        if self.key.choices:
            found.append(f"    one of {', '.join(map(str, self.key.choices))}")
        elif self.key.low is not None or self.key.high is not None:
            low = "" if self.key.low is None else f"from {self.key.low:g} "
            high = "" if self.key.high is None else f"to {self.key.high:g}"
            found.append(f"    {low}{high}".rstrip() + (f": {self.key.why}" if self.key.why else ""))
        if self.key.component is not None:
            names = ", ".join(sorted(provided(self.key.component)))
            found.append(f"    one of {names}, or module:attribute, or file.py:attribute")
        traced = "; arms that differ in it share a compilation" if self.key.traced else ""
        return [*found, f"    {_EFFECTS[self.key.effect]}{traced}"]


def describe(path: str, stage: str = "rl") -> list[Described]:
    """The keys at a dotted path such as "rl.rollout" or "evaluation.k"; "" is all, the stage's as `stage`.

    Raises:
      ConfigError: no such key, with the nearest one; or no such section.
    """
    first, dot, _ = path.partition(".")
    if not dot and first not in {*SECTIONS, *_STAGES, stage, ""}:
        names = ", ".join(dict.fromkeys((*SECTIONS, *_STAGES)))
        raise ConfigError(
            f"{first}: is no section, expected one of {names}, or a key of one; every stage has the keys of {stage}"
        )
    stage = stage if first in {*SECTIONS, ""} else first
    sections: Mapping[str, type] = {**SECTIONS, stage: StageSection}
    known = [each for name, cls in sections.items() for each in _of(cls, f"{name}.")]
    found = [each for each in known if not path or f"{each.path}.".startswith(f"{path}.")]
    if not found:
        raise unknown_key(path, [each.path for each in known])
    return found


def _of(cls: type, where: str) -> Iterator[Described]:
    keys = keys_of(cls)
    for name, key in keys.items():
        yield Described(f"{where}{name}", key)
    for kind in dict.fromkeys(key.component for key in keys.values() if key.component is not None):
        for name, (_, target) in sorted(provided(kind).items()):
            for option, key in keys_of(target).items():
                yield Described(f"{where}{name}.{option}", key)
    for name, inner in sections_of(cls).items():
        yield from _of(inner, f"{where}{name}.")
