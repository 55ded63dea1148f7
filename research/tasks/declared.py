"""Options of tasks and transforms, until each is a component of its own."""

import dataclasses

from research.config.schema import key

_COUNTER = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Generated arithmetic."""

    train: int = key(20_000, "Generated problems to train on.", low=1)
    test: int = key(512, "Generated problems held out, by content.", low=1)
    seed: int = key(0, "Of the generator.", low=0, high=_COUNTER)
    operations: str = key("+-*", "Of the expressions.")
    min_steps: int = key(2, "Operations in an expression, at least.", low=1)
    max_steps: int = key(4, "Operations in an expression, at most.", low=1)
    max_operand: int = key(9, "Largest operand.", low=1)
    max_value: int = key(99, "Bound of every intermediate value.", low=1)


@dataclasses.dataclass(frozen=True)
class Jsonl:
    """A file of problems."""

    path: str = key("", "A JSONL file: prompt/completion, messages, GSM8K.")


@dataclasses.dataclass(frozen=True)
class Terse:
    """Leaves the steps out of a share of generated answers."""

    fraction: float = key(0.5, "Share without steps.", low=0, high=1)


PROVIDES = {"task": {"arithmetic": Arithmetic, "jsonl": Jsonl}, "transform": {"terse": Terse}}
