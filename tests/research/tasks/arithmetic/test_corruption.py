"""A corrupted answer goes wrong in exactly one line, and everything after it follows from that line."""

import random
import re

import numpy as np
import pytest

from research.core.errors import DataError
from research.data.split import Split
from research.tasks.arithmetic.corruption import content_rng, corrupt, pair_records, ranking_records, step_records
from research.tasks.arithmetic.problems import ArithmeticSpec, Item, Move, split_items

SPECS = [ArithmeticSpec(), ArithmeticSpec(min_steps=1, max_steps=5, max_value=60)]


def parts(step):
    left, operation, right, value = re.fullmatch(r"(-?\d+)([-+*])(\d+|\(-\d+\))=(-?\d+)", step).groups()
    return int(left), operation, int(right.strip("()")), int(value)


def compute(left, operation, right):
    return {"+": left + right, "-": left - right, "*": left * right}[operation]


def follow(prompt, claimed):
    """The prompt's value where operation i, innermost first and left before right, yields claimed[i]; and the
    operands that each operation then had. By rewriting the text, not by a tree."""
    values, operands, names = list(claimed), [], {}

    def operand(text):
        return names[text] if text in names else int(text)

    def reduce(text):
        """Rewrites brackets, then products, then sums, each to a name."""
        while True:
            inner = re.search(r"\(([^()]*)\)", text)
            if inner is None:
                return chain(text)
            text = text[: inner.start()] + reduce(inner.group(1)) + text[inner.end() :]

    def chain(text):
        for operations in (r"\*", r"[-+]"):
            while found := re.search(rf"(v?\d+)({operations})(v?\d+)", text):
                name = f"v{len(names)}"
                names[name] = (operand_or_name(found.group(1)), found.group(2), operand_or_name(found.group(3)))
                text = text[: found.start()] + name + text[found.end() :]
        return text

    def operand_or_name(text):
        return text if text in names else int(text)

    def value(ref):
        if isinstance(ref, int):
            return ref
        left, operation, right = names[ref]
        left, right = value(left), value(right)
        operands.append((left, operation, right))
        return values[len(operands) - 1]

    root = reduce(prompt)
    return value(root), operands


@pytest.mark.parametrize("spec", SPECS, ids=["default", "long"])
def test_one_line_is_wrong_and_the_rest_follows_from_it(spec):
    items, _ = split_items(150, 1, seed=3, split=Split(10), spec=spec)
    for item in items:
        wrong, k = corrupt(item, content_rng(item.prompt, 0), max_value=spec.max_value)
        assert wrong.prompt == item.prompt
        assert len(wrong.steps) == len(item.steps)
        assert wrong.steps[:k] == item.steps[:k]
        miscalculated = []
        for step in wrong.steps:
            left, operation, right, value = parts(step)
            miscalculated.append(compute(left, operation, right) != value)
            assert abs(value) <= spec.max_value
        assert miscalculated == [index == k for index in range(len(wrong.steps))]
        claimed = [parts(step)[3] for step in wrong.steps]
        answer, operands = follow(item.prompt, claimed)
        assert operands == [parts(step)[:3] for step in wrong.steps]
        assert str(answer) == wrong.answer != item.answer
        assert wrong.solution == "\n".join([*wrong.steps, f"#### {wrong.answer}"])


def test_the_mistake_may_be_anywhere_and_takes_many_forms():
    items, _ = split_items(
        600, 1, seed=0, split=Split(10), spec=ArithmeticSpec(min_steps=4, max_steps=4, max_value=999)
    )
    drawn = [corrupt(item, content_rng(item.prompt, 0), max_value=10**9) for item in items]
    counts = np.bincount([mistake for _, mistake in drawn], minlength=4)
    assert counts.min() > 100
    slips = set()
    for item, (wrong, mistake) in zip(items, drawn, strict=True):
        slips.add(parts(wrong.steps[mistake])[3] - parts(item.steps[mistake])[3])
    assert {-10, -2, -1, 1, 2, 10} <= slips and len(slips) > 20


def test_content_and_seed_alone_decide():
    items, _ = split_items(40, 1, seed=0, split=Split(10))

    def draw(order, seed):
        return {item: corrupt(item, content_rng(item.prompt, seed), max_value=99) for item in order}

    assert draw(items, 0) == draw(items[::-1], 0)
    assert draw(items, 0) != draw(items, 1)


def item_of(literal, *operations):
    item = Item((Move("", literal, literal),))
    for operation, right in operations:
        item = item.then(operation, right)
    return item


def test_pairs_and_step_records_and_rankings_tell_of_the_same_mistake():
    items, _ = split_items(60, 1, seed=1, split=Split(10))
    for item in items:
        wrong, mistake = corrupt(item, content_rng(item.prompt, 5), max_value=99)
        (pair,) = pair_records(item, seed=5, max_value=99)
        assert pair == {"prompt": item.prompt, "chosen": item.solution, "rejected": wrong.solution}
        good, bad = step_records(item, seed=5, max_value=99)
        assert "\n".join(good["steps"]) == item.solution and set(good["labels"]) == {1.0}
        assert "\n".join(bad["steps"]) == wrong.solution
        assert bad["labels"] == [1.0] * mistake + [0.0] * (len(item.steps) + 1 - mistake)
        assert len(good["labels"]) == len(good["steps"]) == len(item.steps) + 1
        (ranked,) = ranking_records(item, seed=5, max_value=99, candidates=4)
        assert ranked["completions"][0] == item.solution and len(set(ranked["completions"])) == 4
        assert ranked["ranks"][0] == 0 and ranked["ranks"] == sorted(ranked["ranks"])
        first_wrong = []
        for solution in ranked["completions"][1:]:
            lines = solution.split("\n")[:-1]
            values = [compute(*parts(line)[:3]) == parts(line)[3] for line in lines]
            first_wrong.append(values.index(False))
        assert first_wrong == sorted(first_wrong, reverse=True)
        for a in range(3):
            for b in range(3):
                ranks = ranked["ranks"][1:]
                assert (ranks[a] < ranks[b]) == (first_wrong[a] > first_wrong[b])


def test_a_problem_without_a_wrong_answer_is_refused():
    with pytest.raises(DataError, match="'50\\+60' has no wrong answer within max_value = 1"):
        corrupt(item_of(50, ("+", 60)), random.Random(0), max_value=1)
