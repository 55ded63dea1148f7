"""Wrong worked answers to generated arithmetic problems: one wrong step, and all that follows from it.

    (3+4)*2-5    3+4=7       3+4=9
                 7*2=14      9*2=18
                 14-5=9      18-5=13
                 #### 9      #### 13

Only one step is miscalculated: the later ones are right about what they were given. So the label of each step
is known exactly, and a wrong answer can be told from a right one only by the line that went wrong.
"""

import hashlib
import random
from typing import Any

from research.core.errors import DataError
from research.tasks.arithmetic.problems import OPERATIONS, Item

CORRUPTION = 1
"""Raise when the same problem and seed give another wrong answer, so that prepared data is made again."""

_SLIPS = (-10, -2, -1, 1, 2, 10)


def corrupt(item: Item, rng: random.Random, *, max_value: int) -> tuple[Item, int]:
    """The item with one wrong step and a wrong final answer, and the index of that step.

    The wrong step is drawn uniformly, then its value: off by 1, 2 or 10, with the other sign, or by another
    operation. No later operation maps two values to one, so the final answer is wrong too.

    Args:
        item: a right worked answer.
        rng: of the draw.
        max_value: bound of every written value, so that size does not betray a wrong answer.

    Raises:
        DataError: there is no such answer.
    """
    moves = item.moves
    for index in rng.sample(range(len(moves) - 1), len(moves) - 1):
        left, right = moves[index].value, moves[index + 1]
        others = {operation(left, right.literal) for operation in OPERATIONS.values()}
        candidates = {-right.value, *others, *(right.value + slip for slip in _SLIPS)} - {right.value}
        for value in rng.sample(sorted(candidates), len(candidates)):
            wrong = Item((*moves[: index + 1], right._replace(value=value)))
            for later in moves[index + 2 :]:
                wrong = wrong.then(later.operation, later.literal)
            if max(abs(move.value) for move in wrong.moves) <= max_value:
                return wrong, index
    raise DataError(f"arithmetic: {item.prompt!r} has no wrong answer within max_value = {max_value}.")


def content_rng(prompt: str, seed: int) -> random.Random:
    """A generator that depends on this prompt and the seed alone, whatever else is drawn and in which order."""
    digest = hashlib.sha256(f"corrupt {seed} {prompt}".encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def pair_records(item: Item, *, seed: int, max_value: int) -> list[dict[str, Any]]:
    """One {prompt, chosen, rejected}: the right worked answer and a corrupted one."""
    wrong, _ = corrupt(item, content_rng(item.prompt, seed), max_value=max_value)
    return [{"prompt": item.prompt, "chosen": item.solution, "rejected": wrong.solution}]


def step_records(item: Item, *, seed: int, max_value: int) -> list[dict[str, Any]]:
    """Two {prompt, steps, labels} records: the right worked answer and a corrupted one.

    The final line is a step like any other. The mistake and all after it are labelled 0: no later step can be
    part of a right solution.
    """
    wrong, mistake = corrupt(item, content_rng(item.prompt, seed), max_value=max_value)
    records = []
    for worked, first_wrong in ((item, len(item.moves)), (wrong, mistake)):
        lines = worked.solution.split("\n")
        labels = [float(index < first_wrong) for index in range(len(lines))]
        records.append({"prompt": item.prompt, "steps": lines, "labels": labels})
    return records


def ranking_records(item: Item, *, seed: int, max_value: int, candidates: int) -> list[dict[str, Any]]:
    """One {prompt, completions, ranks}: the right answer, then wrong ones, better the later the mistake comes.

    Wrong answers are distinct; a short problem may have fewer of them than asked for.
    """
    rng = content_rng(item.prompt, seed)
    wrong: dict[str, int] = {}
    for _ in range(8 * candidates):
        if len(wrong) == candidates - 1:
            break
        drawn, mistake = corrupt(item, rng, max_value=max_value)
        wrong.setdefault(drawn.solution, mistake)
    order = sorted(set(wrong.values()), reverse=True)
    ranked = sorted(wrong, key=lambda solution: -wrong[solution])
    ranks = [0, *(1 + order.index(wrong[solution]) for solution in ranked)]
    return [{"prompt": item.prompt, "completions": [item.solution, *ranked], "ranks": ranks}]
