"""One declaration of a config key: default, unit, bounds, choices, what it affects, what it means.

A section is a frozen dataclass whose fields are made by `key`; the options of an objective are a mapping from names to
keys. Checks, the resolver, identities, `--help` and the documentation all read these declarations.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from research.core.errors import ConfigError

Effect = Literal["result", "evaluation", "speed", "record", "report"]
"""What a key changes: what is trained; only what is measured at the end; only time and memory; only what is written
down and when; only tables and plots. Only "result" enters the identity of a stage, and only "evaluation" that of an
evaluation; all others may change from one run to the next."""

Kind = Literal["objective", "reward", "task", "transform", "evaluator", "tool", "environment", "optimizer", "schedule"]
"""What a config can name by reference, see `research/config/references.py`."""


@dataclasses.dataclass(frozen=True)
class Key:
    """What may be said about one key.

    Attributes:
      default: also gives the type: bool, int, float, str or tuple.
      doc: one sentence.
      unit: tokens, steps, nats ...; "" where there is none.
      low, high: inclusive bounds of a number (of each number, in a tuple); None is unbounded. NaN and infinity are
        always refused.
      why: the reason for bounds or choices, for the error.
      choices: the values that exist, where there are only a few.
      element: type of a tuple's elements.
      traced: whether the number enters compiled programs as an argument, so that a sweep over it compiles once.
      effect: see `Effect`.
      used: whether the key has an effect, given the values of its section and facts about the stage
        (`research/config/facts.py`); None is always.
      component: the kind of component that the key names, if any.
    """

    default: Any
    doc: str = ""
    unit: str = ""
    low: float | None = None
    high: float | None = None
    why: str = ""
    choices: tuple[Any, ...] = ()
    element: type = str
    traced: bool = False
    effect: Effect = "result"
    used: Callable[[Any, Any], bool] | None = None
    component: Kind | None = None

    def parse(self, where: str, value: Any) -> Any:
        """The value as the key's type, checked.

        Args:
          where: the dotted key, for errors.
          value: from Python or JSON, or `Text` from a command line.

        Raises:
          ConfigError: another type, out of bounds, not one of the choices, not finite.
        """
        value = self._read(value) if isinstance(value, Text) else value
        value = self._typed(where, value)
        self._check(where, value)
        return value

    def _read(self, text: "Text") -> Any:
        raw = text.strip()
        if isinstance(self.default, str):
            return raw
        if isinstance(self.default, tuple):
            inner = raw.removeprefix("(").removesuffix(")").removeprefix("[").removesuffix("]")
            parts = [part.strip().strip("'\"") for part in inner.split(",")]
            return tuple(_scalar(part, self.element) for part in parts if part)
        return _scalar(raw, type(self.default))

    def _typed(self, where: str, value: Any) -> Any:
        want = type(self.default)
        if want is tuple:
            if not isinstance(value, list | tuple):
                raise self._mismatch(where, value)
            return tuple(self._as(where, each, self.element) for each in value)
        return self._as(where, value, want)

    def _as(self, where: str, value: Any, want: type) -> Any:
        if want is float and type(value) is int and abs(value) < 2**1000:
            return float(value)
        if type(value) is not want:
            raise self._mismatch(where, value)
        return value

    def _mismatch(self, where: str, value: Any) -> ConfigError:
        want = type(self.default)
        name = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}
        expected = f"a tuple, each {name[self.element]}" if want is tuple else name[want]
        return ConfigError(f"{where}: got {short(value)}, expected {expected} like {self.default!r}")

    def _check(self, where: str, value: Any) -> None:
        because = f" because {self.why}" if self.why else ""
        for each in value if isinstance(value, tuple) else (value,):
            if self.choices and each not in self.choices:
                listed = ", ".join(map(str, self.choices))
                raise ConfigError(f"{where}: got {short(each)}, expected one of {listed}{because}")
            if isinstance(each, bool) or not isinstance(each, int | float):
                continue
            low, high = self.low, self.high
            inside = (low is None or each >= low) and (high is None or each <= high)  # false for NaN
            if not inside or not math.isfinite(each):
                if low is None and high is None:
                    limits = "a finite number"
                elif high is None:
                    limits = f">= {low:g}"
                else:
                    limits = f"<= {high:g}" if low is None else f"{low:g} to {high:g}"
                raise ConfigError(f"{where}: got {short(each)}, expected {limits}{because}")


class Text(str):
    """A value as the command line (or an arm) spells it; the key's declaration says how to read it."""


def key(
    default: Any,
    doc: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    why: str = "",
    choices: tuple[Any, ...] = (),
    element: type = str,
    effect: Effect = "result",
    used: Callable[[Any, Any], bool] | None = None,
    component: Kind | None = None,
) -> Any:
    """A field of a section's dataclass: see `Key`."""
    declared = Key(default, doc, unit, low, high, why, choices, element, effect=effect, used=used, component=component)
    return dataclasses.field(default=default, metadata={"key": declared})


def number(default: float, doc: str, low: float | None = None, high: float | None = None, why: str = "",
           *, unit: str = "", used: Callable[[Any, Any], bool] | None = None) -> Key:  # fmt: skip
    """A number that enters compiled programs as an argument."""
    return Key(default, doc, unit, low, high, why, traced=True, used=used)


def static_number(default: float, doc: str, low: float | None = None, high: float | None = None, why: str = "",
                  *, unit: str = "", used: Callable[[Any, Any], bool] | None = None) -> Key:  # fmt: skip
    """A number that shapes the program or the choice of rows: read once, when a run starts."""
    return Key(default, doc, unit, low, high, why, used=used)


def choice(default: Any, doc: str, *others: Any, why: str = "",
           used: Callable[[Any, Any], bool] | None = None) -> Key:  # fmt: skip
    """One of a few names: the default or one of the others."""
    return Key(default, doc, why=why, choices=tuple(dict.fromkeys((default, *others))), used=used)


def keys_of(target: Any) -> Mapping[str, Key]:
    """The keys that something declares: an `options` mapping, or the `key` fields of a dataclass; else none."""
    options = vars(target).get("options") if hasattr(target, "__dict__") else None
    if isinstance(options, Mapping):
        return options
    if not dataclasses.is_dataclass(target):
        return {}
    return {f.name: f.metadata["key"] for f in dataclasses.fields(target) if "key" in f.metadata}


def sections_of(target: Any) -> Mapping[str, type]:
    """The sections within a section: the fields of a dataclass that are dataclasses themselves."""
    if not dataclasses.is_dataclass(target):
        return {}
    fields = dataclasses.fields(target)
    return {f.name: f.type for f in fields if isinstance(f.type, type) and dataclasses.is_dataclass(f.type)}


def with_defaults(options: Mapping[str, Key], defaults: Mapping[str, Any]) -> dict[str, Key]:
    """The same keys with other defaults, as members of a family have them."""
    assert defaults.keys() <= options.keys()
    return {
        name: dataclasses.replace(declared, default=defaults[name]) if name in defaults else declared
        for name, declared in options.items()
    }


def short(value: Any) -> str:
    """A value as errors show it, cut to a line."""
    text = repr(str(value)) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _scalar(raw: str, want: type) -> Any:
    """A number or truth value from its text; the text itself where it is neither, for the error."""
    if want is str:
        return raw
    lowered = {"true": True, "false": False}.get(raw.lower())
    if lowered is not None or want is bool:
        return raw if lowered is None else lowered
    try:
        return int(raw.replace("_", "")) if want is int else float(raw)
    except (ValueError, OverflowError):
        return raw
