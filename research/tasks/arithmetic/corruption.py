"""Wrong worked answers to generated arithmetic problems: one wrong step, and all that follows from it.

    (3+4)*2-5    3+4=7       3+4=9
                 7*2=14      9*2=18
                 14-5=9      18-5=13
                 #### 9      #### 13

Only one step is miscalculated: the later ones are right about what they were given. So the label of each step
is known exactly, and a wrong answer can be told from a right one only by the line that went wrong.
"""

import ast
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from research.core.errors import DataError
from research.tasks.arithmetic.problems import ANSWER_MARK, Item

CORRUPTION = 1
"""Raise when the same problem and seed give another wrong answer, so that prepared data is made again."""

_OPERATIONS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}
_SLIPS = (-10, -2, -1, 1, 2, 10)


@dataclass(frozen=True)
class Corruption:
    """A wrong worked answer; `mistake_index` is that of the step that was miscalculated, from 0."""

    steps: tuple[str, ...]
    answer: str
    mistake_index: int

    @property
    def solution(self) -> str:
        """The steps, one a line, then GSM8K's final line."""
        return "\n".join((*self.steps, ANSWER_MARK + self.answer))


def corrupt(prompt: str, rng: random.Random, *, max_value: int | None = None) -> Corruption:
    """A worked answer with one wrong step and a wrong final answer.

    The wrong step is drawn uniformly, then its value: off by 1, 2 or 10, with the other sign, or by another
    operation. A draw whose final answer is right after all, or too large, is drawn again.

    Args:
        prompt: an expression of `research.tasks.arithmetic.problems`.
        rng: of the draw.
        max_value: bound of every written value, so that size does not betray a wrong answer; None for no bound.

    Raises:
        DataError: the prompt is no such expression, or has no step.
    """
    tree = _parse(prompt)
    right: list[str] = []
    truth = _evaluate(tree, right, None)
    for index in rng.sample(range(len(right)), len(right)):
        for value in _wrong_values(right[index], rng):
            steps: list[str] = []
            answer = _evaluate(tree, steps, (index, value))
            values = [int(step.rpartition("=")[2]) for step in steps]
            if answer != truth and (max_value is None or max(map(abs, values)) <= max_value):
                return Corruption(tuple(steps), str(answer), index)
    raise DataError(f"arithmetic: {prompt!r} has no wrong answer within max_value = {max_value}.")


def content_rng(prompt: str, seed: int) -> random.Random:
    """A generator that depends on this prompt and the seed alone, whatever else is drawn and in which order."""
    digest = hashlib.sha256(f"corrupt {seed} {prompt}".encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def pair_record(item: Item, *, seed: int, max_value: int) -> dict[str, Any]:
    """{prompt, chosen, rejected}: the right worked answer and a corrupted one."""
    wrong = corrupt(item.prompt, content_rng(item.prompt, seed), max_value=max_value)
    return {"prompt": item.prompt, "chosen": item.solution, "rejected": wrong.solution}


def step_records(item: Item, *, seed: int, max_value: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two {prompt, steps, labels} records: the right worked answer and a corrupted one.

    The final line is a step like any other. The mistake and all after it are labelled 0: no later step can be
    part of a right solution.
    """
    wrong = corrupt(item.prompt, content_rng(item.prompt, seed), max_value=max_value)
    right_lines, wrong_lines = item.solution.split("\n"), wrong.solution.split("\n")
    labels = [float(index < wrong.mistake_index) for index in range(len(wrong_lines))]
    return (
        {"prompt": item.prompt, "steps": right_lines, "labels": [1.0] * len(right_lines)},
        {"prompt": item.prompt, "steps": wrong_lines, "labels": labels},
    )


def ranking_record(item: Item, *, seed: int, max_value: int, candidates: int) -> dict[str, Any]:
    """{prompt, completions, ranks}: the right answer, then wrong ones, better the later the mistake comes.

    Wrong answers are distinct; a short problem may have fewer of them than asked for.
    """
    rng = content_rng(item.prompt, seed)
    wrong: dict[str, int] = {}
    for _ in range(8 * candidates):
        if len(wrong) == candidates - 1:
            break
        drawn = corrupt(item.prompt, rng, max_value=max_value)
        wrong.setdefault(drawn.solution, drawn.mistake_index)
    order = sorted(set(wrong.values()), reverse=True)
    ranked = sorted(wrong, key=lambda solution: -wrong[solution])
    return {
        "prompt": item.prompt,
        "completions": [item.solution, *ranked],
        "ranks": [0, *(1 + order.index(wrong[solution]) for solution in ranked)],
    }


def _parse(prompt: str) -> ast.BinOp:
    try:
        tree = ast.parse(prompt, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise DataError(f"arithmetic: {prompt!r:.60} is no expression of +, - and *.") from error
    if isinstance(tree, ast.Constant):
        raise DataError(f"arithmetic: {prompt!r:.60} has no step that could be wrong.")
    for node in ast.walk(tree):
        known = isinstance(node, ast.BinOp | ast.operator) or (
            isinstance(node, ast.Constant) and type(node.value) is int
        )
        if not known or (isinstance(node, ast.BinOp) and type(node.op) not in _OPERATIONS):
            raise DataError(f"arithmetic: {prompt!r:.60} is no expression of +, - and *.")
    assert isinstance(tree, ast.BinOp)
    return tree


def _evaluate(node: ast.expr, steps: list[str], wrong: tuple[int, int] | None) -> int:
    """Value of an expression; writes its steps. `wrong` = (i, v): step i claims the value v."""
    if isinstance(node, ast.Constant):
        assert isinstance(node.value, int)
        return node.value
    assert isinstance(node, ast.BinOp)
    left, right = _evaluate(node.left, steps, wrong), _evaluate(node.right, steps, wrong)
    operation = _OPERATIONS[type(node.op)]
    value = _apply(operation, left, right)
    if wrong is not None and len(steps) == wrong[0]:
        value = wrong[1]
    steps.append(f"{left}{operation}{f'({right})' if right < 0 else right}={value}")
    return value


def _apply(operation: str, left: int, right: int) -> int:
    if operation == "+":
        return left + right
    return left - right if operation == "-" else left * right


def _wrong_values(step: str, rng: random.Random) -> Iterator[int]:
    """Wrong results that someone might write for this step, in a drawn order."""
    expression, _, result = step.rpartition("=")
    value = int(result)
    node = ast.parse(expression, mode="eval").body
    assert isinstance(node, ast.BinOp)
    left, right = (ast.literal_eval(side) for side in (node.left, node.right))
    others = {_apply(operation, left, right) for operation in _OPERATIONS.values()}
    candidates = {-value, *others, *(value + slip for slip in _SLIPS)} - {value}
    yield from rng.sample(sorted(candidates), len(candidates))
