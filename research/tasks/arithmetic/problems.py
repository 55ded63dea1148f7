"""A generated task with checkable steps: integer expressions, evaluated one operation a line.

    prompt    (3+4)*2-5
    solution  3+4=7
              7*2=14
              14-5=9
              #### 9

Held-out items are held out by content (`research.data.split`), whatever the seed or the count.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

import numpy as np

from research.core.errors import DataError
from research.data.split import Split

ANSWER_MARK = "#### "
_ENUMERABLE = 300_000  # so many expressions are listed where a request comes close to their number
_PRECEDENCE = {"+": 1, "-": 1, "*": 2}

# An expression: a literal, or (operation, left, right, value).
_Node = int | tuple[str, "_Node", "_Node", int]
Number = TypeVar("Number", int, np.ndarray)


@dataclass(frozen=True)
class ArithmeticSpec:
    """Which expressions exist.

    Attributes:
        operations: a subset of "+-*".
        min_steps, max_steps: operations in an expression; its difficulty.
        max_operand: literals are drawn from 1..max_operand.
        max_value: every intermediate and final value v has -max_value <= v <= max_value.
        shape: "chain" applies one literal after another to a running value, "tree" nests freely.
    """

    operations: str = "+-*"
    min_steps: int = 2
    max_steps: int = 4
    max_operand: int = 9
    max_value: int = 99
    shape: Literal["chain", "tree"] = "chain"

    def __post_init__(self) -> None:
        if not self.operations or not set(self.operations) <= set(_PRECEDENCE):
            raise DataError(f"arithmetic: operations is {self.operations!r}, expected a subset of '+-*'.")
        if len(set(self.operations)) != len(self.operations):
            raise DataError(f"arithmetic: operations is {self.operations!r}, expected each one once.")
        if not 1 <= self.min_steps <= self.max_steps:
            raise DataError(
                f"arithmetic: min_steps is {self.min_steps} and max_steps {self.max_steps}, "
                "expected 1 <= min_steps <= max_steps."
            )
        if not 1 <= self.max_operand <= self.max_value:
            raise DataError(
                f"arithmetic: max_operand is {self.max_operand} and max_value {self.max_value}, "
                "expected 1 <= max_operand <= max_value."
            )
        if self.shape not in ("chain", "tree"):
            raise DataError(f"arithmetic: shape is {self.shape!r}, expected 'chain' or 'tree'.")


@dataclass(frozen=True)
class Item:
    """One expression, its worked solution and its answer; `difficulty` is the number of operations."""

    prompt: str
    steps: tuple[str, ...]
    answer: str
    difficulty: int
    kind: str

    @property
    def solution(self) -> str:
        """The steps, one a line, then GSM8K's final line."""
        return "\n".join((*self.steps, ANSWER_MARK + self.answer))


def split_items(
    n_train: int, n_test: int, *, seed: int, split: Split, spec: ArithmeticSpec | None = None
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Unique training and held-out items, disjoint by content.

    Difficulties are drawn uniformly for as long as there are fresh items of each (a request for most of a
    small space gets its items in the proportion in which they exist).

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
    found: dict[bool, dict[str, _Node]] = {False: {}, True: {}}
    if total > _ENUMERABLE or needed < total / 2:
        _draw(found, wanted, spec, split, rng)
    else:
        nodes = [node for steps in range(spec.min_steps, spec.max_steps + 1) for node in _all(spec, steps)]
        rng.shuffle(nodes)
        for node in nodes:
            prompt = _text(node)
            held = split.holds_out(prompt)
            if len(found[held]) < wanted[held]:
                found[held][prompt] = node
    for held_out, name in ((False, "training"), (True, "held-out")):
        if len(found[held_out]) < wanted[held_out]:
            raise DataError(
                f"arithmetic: asked for {wanted[held_out]} unique {name} items, found {len(found[held_out])} "
                f"among {total} expressions, of which data.validation_one_in={split.one_in} holds out one in so "
                "many; raise max_steps, max_operand or max_value, or ask for fewer."
            )
    train, test = (tuple(_item(node, spec) for node in found[held].values()) for held in (False, True))
    return train, test


def _draw(
    found: dict[bool, dict[str, _Node]], wanted: dict[bool, int], spec: ArithmeticSpec, split: Split, rng: random.Random
) -> None:
    """Draws until both splits are full, or until fresh items have become rare."""
    attempts = 0
    limit = 10_000 + 60 * (wanted[False] + split.one_in * wanted[True])
    while any(len(found[held]) < wanted[held] for held in wanted) and attempts < limit:
        attempts += 1
        node = _random_node(spec, rng.randint(spec.min_steps, spec.max_steps), rng)
        if node is None:
            continue
        prompt = _text(node)
        held = split.holds_out(prompt)
        if len(found[held]) < wanted[held]:
            found[held].setdefault(prompt, node)


def _random_node(spec: ArithmeticSpec, steps: int, rng: random.Random) -> _Node | None:
    if steps == 0:
        return rng.randint(1, spec.max_operand)
    left_steps = steps - 1 if spec.shape == "chain" else rng.randrange(steps)
    left = _random_node(spec, left_steps, rng)
    right = _random_node(spec, steps - 1 - left_steps, rng) if left is not None else None
    if left is None or right is None:
        return None
    # Redrawing the operation, not the whole expression, keeps rejection cheap for long chains.
    for operation in rng.sample(spec.operations, len(spec.operations)):
        value = _apply(operation, _value(left), _value(right))
        if abs(value) <= spec.max_value:
            return operation, left, right, value
    return None


def _all(spec: ArithmeticSpec, steps: int) -> Iterator[_Node]:
    """Every expression with this many operations, in a fixed order."""
    if steps == 0:
        yield from range(1, spec.max_operand + 1)
        return
    for left_steps in (steps - 1,) if spec.shape == "chain" else range(steps):
        for left in _all(spec, left_steps):
            for right in _all(spec, steps - 1 - left_steps):
                for operation in spec.operations:
                    value = _apply(operation, _value(left), _value(right))
                    if abs(value) <= spec.max_value:
                        yield operation, left, right, value


@lru_cache(maxsize=64)
def count_expressions(spec: ArithmeticSpec) -> int:
    """The exact number of expressions, from the number that reach each value (no listing)."""
    width = 2 * spec.max_value + 1
    values = np.arange(-spec.max_value, spec.max_value + 1)
    literals = np.zeros(width)
    literals[spec.max_value + 1 : spec.max_value + 1 + spec.max_operand] = 1
    counts = [literals]
    for steps in range(1, spec.max_steps + 1):
        reached = np.zeros(width)
        for left_steps in (steps - 1,) if spec.shape == "chain" else range(steps):
            ways = np.outer(counts[left_steps], counts[steps - 1 - left_steps])
            left, right = np.nonzero(ways)
            for operation in spec.operations:
                result = _apply(operation, values[left], values[right])
                inside = np.abs(result) <= spec.max_value
                np.add.at(reached, result[inside] + spec.max_value, ways[left, right][inside])
        counts.append(reached)
    return int(sum(reached.sum() for reached in counts[spec.min_steps :]))


def _apply(operation: str, left: Number, right: Number) -> Number:
    if operation == "+":
        return left + right
    return left - right if operation == "-" else left * right


def _value(node: _Node) -> int:
    return node if isinstance(node, int) else node[3]


def _text(node: _Node) -> str:
    """Infix with the fewest parentheses that keep the tree (all operations associate to the left)."""
    if isinstance(node, int):
        return str(node)
    operation, left, right, _ = node
    rank = _PRECEDENCE[operation]
    left_text = f"({_text(left)})" if _rank(left) < rank else _text(left)
    right_text = f"({_text(right)})" if _rank(right) <= rank else _text(right)
    return f"{left_text}{operation}{right_text}"


def _rank(node: _Node) -> int:
    return 3 if isinstance(node, int) else _PRECEDENCE[node[0]]


def _steps(node: _Node) -> Iterator[str]:
    """Innermost first, left before right; a negative right operand stands in parentheses."""
    if not isinstance(node, int):
        operation, left, right, value = node
        yield from _steps(left)
        yield from _steps(right)
        right_text = f"({_value(right)})" if _value(right) < 0 else str(_value(right))
        yield f"{_value(left)}{operation}{right_text}={value}"


def _item(node: _Node, spec: ArithmeticSpec) -> Item:
    steps = tuple(_steps(node))
    return Item(_text(node), steps, str(_value(node)), len(steps), spec.shape)
