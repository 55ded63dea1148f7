"""A generated task with checkable steps: integer expressions, evaluated one operation a line.

    prompt    (3+4)*2-5
    solution  3+4=7
              7*2=14
              14-5=9
              #### 9

Held-out items are held out by content (`research.data.split`), whatever the seed or the count.
"""

import operator
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from research.config.schema import key
from research.core.errors import DataError
from research.data.split import Split
from research.tasks.answers import MARK

OPERATIONS: Mapping[str, Callable[[Any, Any], Any]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_ENUMERABLE = 300_000  # so many expressions are listed where a request comes close to their number


@dataclass(frozen=True)
class ArithmeticSpec:
    """Which expressions exist: one literal after another is applied to a running value."""

    operations: str = key("+-*", "Which of + - * occur.")
    min_steps: int = key(2, "Fewest operations in an expression.", low=1)
    max_steps: int = key(4, "Most operations in an expression.", low=1)
    max_operand: int = key(9, "Literals are 1 to this.", low=1)
    max_value: int = key(99, "Bound of every intermediate value.", low=1)

    def __post_init__(self) -> None:
        if not self.operations or not set(self.operations) <= set(OPERATIONS):
            raise DataError(f"arithmetic: operations is {self.operations!r}, expected a subset of '+-*'.")
        if len(set(self.operations)) != len(self.operations):
            raise DataError(f"arithmetic: operations is {self.operations!r}, expected each one once.")
        for low, high in (("min_steps", "max_steps"), ("max_operand", "max_value")):
            if not 1 <= getattr(self, low) <= getattr(self, high):
                raise DataError(
                    f"arithmetic: {low} is {getattr(self, low)} and {high} {getattr(self, high)}, expected "
                    f"1 <= {low} <= {high}."
                )


class Move(NamedTuple):
    """An operation with a literal, and the value that it is said to give; the first move of an item has none ("")."""

    operation: str
    literal: int
    value: int


@dataclass(frozen=True)
class Item:
    """An expression and its worked answer; `moves` are evaluated from the first to the last."""

    moves: tuple[Move, ...]

    @property
    def prompt(self) -> str:
        """Infix with the fewest parentheses."""
        text = str(self.moves[0].literal)
        for before, (operation, literal, _) in zip(self.moves, self.moves[1:], strict=False):
            bracketed = operation == "*" and before.operation in ("+", "-")
            text = f"({text}){operation}{literal}" if bracketed else f"{text}{operation}{literal}"
        return text

    @property
    def steps(self) -> tuple[str, ...]:
        """One operation each, such as "3+4=7"."""
        pairs = zip(self.moves, self.moves[1:], strict=False)
        return tuple(f"{left.value}{operation}{literal}={value}" for left, (operation, literal, value) in pairs)

    @property
    def answer(self) -> str:
        """The last value."""
        return str(self.moves[-1].value)

    @property
    def solution(self) -> str:
        """The steps, one a line, then GSM8K's final line."""
        return "\n".join((*self.steps, f"{MARK} {self.answer}"))

    def then(self, operation: str, literal: int) -> "Item":
        """One operation more, rightly calculated."""
        value = OPERATIONS[operation](self.moves[-1].value, literal)
        return Item((*self.moves, Move(operation, literal, value)))


def split_items(
    n_train: int, n_test: int, *, seed: int, split: Split, spec: ArithmeticSpec | None = None
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Unique training and held-out items, disjoint by content.

    Numbers of steps are drawn uniformly for as long as there are fresh items of each (a request for most of a small
    space gets its items in the proportion in which they exist).

    Raises:
        DataError: more items are asked for than exist.
    """
    spec = spec or ArithmeticSpec()
    wanted = {False: n_train, True: n_test}
    rng = random.Random(seed)
    total = count_expressions(spec)
    if n_train + n_test > total:
        raise DataError(
            f"arithmetic: asked for {n_train} + {n_test} unique items, but only {total} expressions exist; "
            "raise max_steps, max_operand or max_value, or ask for fewer."
        )
    # Near the share that a split has of all, random draws would mostly repeat, so list instead.
    needed = max(n_train / (1 - 1 / split.one_in), n_test * split.one_in)
    if total > _ENUMERABLE or needed < total / 2:
        items = _drawn(spec, rng, attempts=10_000 + 60 * (n_train + split.one_in * n_test))
    else:
        listed = [item for steps in range(spec.min_steps, spec.max_steps + 1) for item in _all(spec, steps)]
        rng.shuffle(listed)
        items = iter(listed)
    found: dict[bool, dict[str, Item]] = {False: {}, True: {}}
    for item in items:
        held = split.holds_out(item.prompt)
        if len(found[held]) < wanted[held]:
            found[held].setdefault(item.prompt, item)
        if all(len(found[each]) == wanted[each] for each in wanted):
            break
    for held, name in ((False, "training"), (True, "held-out")):
        if len(found[held]) < wanted[held]:
            raise DataError(
                f"arithmetic: asked for {wanted[held]} unique {name} items, found {len(found[held])} "
                f"among {total} expressions, of which data.validation_one_in={split.one_in} holds out one in so "
                "many; raise max_steps, max_operand or max_value, or ask for fewer."
            )
    return tuple(found[False].values()), tuple(found[True].values())


def _drawn(spec: ArithmeticSpec, rng: random.Random, attempts: int) -> Iterator[Item]:
    """Random items, which may repeat; an attempt that no operation keeps within bounds gives none."""
    for _ in range(attempts):
        steps = rng.randint(spec.min_steps, spec.max_steps)
        item: Item | None = _literal(rng.randint(1, spec.max_operand))
        while item is not None and len(item.moves) <= steps:
            literal = rng.randint(1, spec.max_operand)
            # Redrawing the operation, not the whole expression, keeps rejection cheap for long chains.
            operations = rng.sample(spec.operations, len(spec.operations))
            item = next(_longer(item, literal, operations, spec.max_value), None)
        if item is not None:
            yield item


def _all(spec: ArithmeticSpec, steps: int) -> Iterator[Item]:
    """Every expression with this many operations, in a fixed order."""
    if steps == 0:
        yield from map(_literal, range(1, spec.max_operand + 1))
        return
    for item in _all(spec, steps - 1):
        for literal in range(1, spec.max_operand + 1):
            yield from _longer(item, literal, spec.operations, spec.max_value)


def _literal(value: int) -> Item:
    return Item((Move("", value, value),))


def _longer(item: Item, literal: int, operations: Iterable[str], max_value: int) -> Iterator[Item]:
    """The item with one operation more, for each one that keeps its value within bounds."""
    longer = (item.then(operation, literal) for operation in operations)
    return (each for each in longer if abs(each.moves[-1].value) <= max_value)


@lru_cache(maxsize=64)
def count_expressions(spec: ArithmeticSpec) -> int:
    """The exact number of expressions, from the number that reach each value (no listing)."""
    values = np.arange(-spec.max_value, spec.max_value + 1)
    counts = np.where((values >= 1) & (values <= spec.max_operand), 1.0, 0.0)
    total = 0.0
    for steps in range(1, spec.max_steps + 1):
        reached = np.zeros(len(values))
        for literal in range(1, spec.max_operand + 1):
            for operation in spec.operations:
                result = OPERATIONS[operation](values, literal)  # no two values give one result
                inside = np.abs(result) <= spec.max_value
                reached[result[inside] + spec.max_value] += counts[inside]
        counts = reached
        total += counts.sum() if steps >= spec.min_steps else 0.0
    return int(total)
