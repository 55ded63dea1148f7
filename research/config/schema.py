"""One declaration of a config key, which checks, identities and the documentation read.

A section is a frozen dataclass with fields made by `key`; the options of an objective are a mapping of names to keys.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, ParamSpec, get_args, get_origin

from research.core.errors import ConfigError

Effect = Literal["result", "evaluation", "speed", "record", "report"]
"""What a key changes: what is trained; only what is measured at the end; only time and memory; only what is written
down and when; only tables and plots. The first enters a stage's identity, the second an evaluation's."""

Kind = Literal["objective", "reward", "task", "transform", "evaluator", "tool", "environment", "optimizer", "schedule"]
"""What a config can name by reference, see `research/config/references.py`."""

Used = Callable[[Any, Any], object]


@dataclasses.dataclass(frozen=True)
class Key:
    """What may be said about one key.

    Attributes:
      default: also gives the type: bool, int, float, str or tuple.
      low, high: inclusive bounds of a number (of each number, in a tuple); NaN and infinity are always refused.
      why: the reason for bounds or choices, for the error.
      unit: tokens, steps, nats ...
      choices, element: the only values, and the type of a tuple's elements; a field's type says them too.
      traced: whether the number enters compiled programs as an argument, so that a sweep over it compiles once.
      used: whether the key has an effect, given its section and `sections.Facts` about the stage; None is always.
      component: the kind of component that the key names, if any.
    """

    default: Any
    doc: str = ""
    low: float | None = None
    high: float | None = None
    why: str = ""
    _: dataclasses.KW_ONLY
    unit: str = ""
    choices: tuple[Any, ...] = ()
    element: type = str
    traced: bool = False
    effect: Effect = "result"
    used: Used | None = None
    component: Kind | None = None

    def parse(self, where: str, value: Any) -> Any:
        """The value as the key's type; `where` is the dotted key, for errors.

        Raises:
          ConfigError: another type, out of bounds, not one of the choices, not finite.
        """
        many = isinstance(self.default, tuple)
        want = self.element if many else type(self.default)
        if isinstance(value, Text):
            value = _elements(value, want) if many else _scalar(value.strip(), want)
        expected = f"{'a tuple, each ' if many else ''}{_TYPES.get(want, want.__name__)} like {self.default!r}"
        expect(not many or isinstance(value, list | tuple), where, value, expected)
        found = []
        for each in value if many else (value,):
            whole = want is float and type(each) is int and abs(each) < 2**1000
            expect(whole or type(each) is want, where, each, expected)
            found.append(float(each) if whole else each)
        for each in found:
            self._check(where, each)
        return tuple(found) if many else found[0]

    def _check(self, where: str, value: Any) -> None:
        because = f" because {self.why}" if self.why else ""
        if self.choices:
            expect(value in self.choices, where, value, f"one of {', '.join(map(str, self.choices))}{because}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            return
        low, high = self.low, self.high
        if low is None and high is None:
            limits = "a finite number"
        elif high is None:
            limits = f">= {low:g}"
        else:
            limits = f"<= {high:g}" if low is None else f"{low:g} to {high:g}"
        inside = (low is None or value >= low) and (high is None or value <= high)  # false for NaN
        expect(inside and math.isfinite(value), where, value, f"{limits}{because}")


_TYPES = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}


class Text(str):
    """A value as the command line (or an arm) spells it; the key's declaration says how to read it."""


_P = ParamSpec("_P")


def _as_field(declare: Callable[_P, Key]) -> Callable[_P, Any]:
    def field(*args: _P.args, **kwargs: _P.kwargs) -> Any:
        declared = declare(*args, **kwargs)
        return dataclasses.field(default=declared.default, metadata={"key": declared})

    return field


key = _as_field(Key)
"""A field of a section's dataclass; takes what `Key` takes."""
number = functools.partial(Key, traced=True)
"""A number that enters compiled programs as an argument."""
static_number = Key
"""A number that shapes the program or the choice of rows: read once, when a run starts."""


def choice(default: Any, doc: str, *others: Any, why: str = "", used: Used | None = None) -> Key:
    """One of a few names: the default or one of the others."""
    return Key(default, doc, why=why, choices=tuple(dict.fromkeys((default, *others))), used=used)


def keys_of(target: Any) -> Mapping[str, Key]:
    """The keys that something declares: an `options` mapping, or the `key` fields of a dataclass; else none."""
    options = getattr(target, "__dict__", {}).get("options")
    if isinstance(options, Mapping):
        return options
    return _fields_of(target if isinstance(target, type) else type(target))


@functools.cache
def _fields_of(cls: type) -> Mapping[str, Key]:
    """The `key` fields of a dataclass, each with what its type says of its elements and choices."""
    found = {}
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        if "key" not in field.metadata:
            continue
        said: dict[str, Any] = {}
        annotation: Any = field.type
        if get_origin(annotation) is tuple:
            annotation = get_args(annotation)[0]
            said |= {"element": annotation} if isinstance(annotation, type) else {}
        if get_origin(annotation) is Literal:
            said["choices"] = get_args(annotation)
        found[field.name] = dataclasses.replace(field.metadata["key"], **said)
    return found


def sections_of(target: Any) -> Mapping[str, type]:
    """The sections within a section: the fields of a dataclass that are dataclasses themselves."""
    fields = dataclasses.fields(target) if dataclasses.is_dataclass(target) else ()
    return {f.name: f.type for f in fields if isinstance(f.type, type) and dataclasses.is_dataclass(f.type)}


def with_defaults(options: Mapping[str, Key], defaults: Mapping[str, Any]) -> dict[str, Key]:
    """The same keys with other defaults."""
    changed = {name: dataclasses.replace(options[name], default=value) for name, value in defaults.items()}
    return {**options, **changed}


def expect(right: object, key: str, got: Any, expected: str) -> None:
    """Raises ConfigError "key: got X, expected Y" unless it is right."""
    if not right:
        raise ConfigError(f"{key}: got {short(got)}, expected {expected}")


def short(value: Any) -> str:
    """A value as errors show it, cut to a line."""
    text = repr(str(value)) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _elements(raw: str, want: type) -> tuple[Any, ...]:
    inner = raw.strip().removeprefix("(").removesuffix(")").removeprefix("[").removesuffix("]")
    parts = [part.strip().strip("'\"") for part in inner.split(",")]
    return tuple(_scalar(part, want) for part in parts if part)


def _scalar(raw: str, want: type) -> Any:
    """A number or truth value from its text; the text itself where it is neither, for the error."""
    if want is str:
        return raw
    truth = {"true": True, "false": False}.get(raw.lower())
    if truth is not None or want is bool:
        return raw if truth is None else truth
    try:
        return int(raw.replace("_", "")) if want is int else float(raw)
    except (ValueError, OverflowError):
        return raw
