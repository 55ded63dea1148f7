"""A corrupted answer goes wrong in exactly one line, and everything after it follows from that line."""

import random
import re

import numpy as np
import pytest

from research.core.errors import DataError
from research.data.split import Split
from research.tasks.arithmetic.corruption import content_rng, corrupt, pair_record, ranking_record, step_records
from research.tasks.arithmetic.problems import ArithmeticSpec, split_items

SPECS = [ArithmeticSpec(), ArithmeticSpec(shape="tree", min_steps=1, max_steps=5, max_value=60)]


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


@pytest.mark.parametrize("spec", SPECS, ids=["chain", "tree"])
def test_one_line_is_wrong_and_the_rest_follows_from_it(spec):
    items, _ = split_items(150, 1, seed=3, split=Split(10), spec=spec)
    for item in items:
        wrong = corrupt(item.prompt, content_rng(item.prompt, 0), max_value=spec.max_value)
        k = wrong.mistake_index
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
    drawn = [corrupt(item.prompt, content_rng(item.prompt, 0)) for item in items]
    counts = np.bincount([wrong.mistake_index for wrong in drawn], minlength=4)
    assert counts.min() > 100
    slips = set()
    for item, wrong in zip(items, drawn, strict=True):
        slips.add(parts(wrong.steps[wrong.mistake_index])[3] - parts(item.steps[wrong.mistake_index])[3])
    assert {-10, -2, -1, 1, 2, 10} <= slips and len(slips) > 20


def test_content_and_seed_alone_decide():
    items, _ = split_items(40, 1, seed=0, split=Split(10))
    draw = lambda order, seed: {p: corrupt(p, content_rng(p, seed)) for p in order}  # noqa: E731
    prompts = [item.prompt for item in items]
    assert draw(prompts, 0) == draw(prompts[::-1], 0)
    assert draw(prompts, 0) != draw(prompts, 1)


def test_a_right_answer_after_all_is_drawn_again():
    # (1-1)*x: any wrong x gives 0 again, so the mistake must come elsewhere.
    for seed in range(60):
        wrong = corrupt("(1-1)*(2+3)", random.Random(seed))
        assert wrong.answer != "0" and wrong.mistake_index != 1


def test_pairs_and_step_records_and_rankings_tell_of_the_same_mistake():
    items, _ = split_items(60, 1, seed=1, split=Split(10))
    for item in items:
        wrong = corrupt(item.prompt, content_rng(item.prompt, 5), max_value=99)
        pair = pair_record(item, seed=5, max_value=99)
        assert pair == {"prompt": item.prompt, "chosen": item.solution, "rejected": wrong.solution}
        good, bad = step_records(item, seed=5, max_value=99)
        assert "\n".join(good["steps"]) == item.solution and set(good["labels"]) == {1.0}
        assert "\n".join(bad["steps"]) == wrong.solution
        assert bad["labels"] == [1.0] * wrong.mistake_index + [0.0] * (len(item.steps) + 1 - wrong.mistake_index)
        assert len(good["labels"]) == len(good["steps"]) == len(item.steps) + 1
        ranked = ranking_record(item, seed=5, max_value=99, candidates=4)
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


@pytest.mark.parametrize("prompt", ["1/2", "x+1", "1+", "1+2**3", "-1+2", "1.5+2", "True+1", "1+2 or 3", ""])
def test_other_expressions_are_refused(prompt):
    with pytest.raises(DataError, match="is no expression of"):
        corrupt(prompt, random.Random(0))


def test_a_problem_without_a_step_or_a_wrong_answer_is_refused():
    with pytest.raises(DataError, match="'7' has no step that could be wrong"):
        corrupt("7", random.Random(0))
    with pytest.raises(DataError, match="'50\\+60' has no wrong answer within max_value = 1"):
        corrupt("50+60", random.Random(0), max_value=1)
