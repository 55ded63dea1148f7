"""Generated items are right, checkable step by step, unique, and held out by content."""

import re
from functools import partial

import numpy as np
import pytest

from research.core.errors import DataError
from research.data.split import Split
from research.tasks.arithmetic.problems import ArithmeticSpec, Item, Move, count_expressions
from research.tasks.arithmetic.problems import split_items as split_by

SPLIT = Split(10)
is_held_out, split_items = SPLIT.holds_out, partial(split_by, split=SPLIT)
LONG = ArithmeticSpec(min_steps=1, max_steps=5)


def step_values(step):
    left, operation, right, value = re.fullmatch(r"(-?\d+)([-+*])(\d+|\(-\d+\))=(-?\d+)", step).groups()
    return int(left), operation, int(right.strip("()")), int(value)


@pytest.mark.parametrize("spec", [ArithmeticSpec(), LONG, ArithmeticSpec(max_value=20, operations="*-")])
def test_items_are_right_step_by_step(spec):
    train, test = split_items(300, 30, seed=1, spec=spec)
    for item in train + test:
        assert eval(item.prompt) == int(item.answer)
        assert spec.min_steps <= len(item.steps) <= spec.max_steps
        assert len(item.steps) == sum(item.prompt.count(operation) for operation in "+-*")
        for step in item.steps:
            left, operation, right, value = step_values(step)
            assert eval(f"({left}){operation}({right})") == value
            assert abs(value) <= spec.max_value
        assert step_values(item.steps[-1])[3] == int(item.answer)
        assert item.solution.splitlines() == [*item.steps, f"#### {item.answer}"]


def test_the_worked_example():
    item = Item((Move("", 3, 3),)).then("+", 4).then("*", 2).then("-", 5)
    assert item.prompt == "(3+4)*2-5"
    assert item.solution == "3+4=7\n7*2=14\n14-5=9\n#### 9"
    negative = Item((Move("", 2, 2),)).then("-", 6).then("*", 5)
    assert (negative.prompt, negative.steps) == ("(2-6)*5", ("2-6=-4", "-4*5=-20"))


def test_splits_are_disjoint_by_content_whatever_the_seed_and_count():
    trains, tests = set(), set()
    for seed, count in ((0, 500), (1, 300), (2, 700)):
        train, test = split_items(count, count // 10, seed=seed, spec=LONG)
        assert len({item.prompt for item in train + test}) == count + count // 10
        trains |= {item.prompt for item in train}
        tests |= {item.prompt for item in test}
    assert not trains & tests
    assert all(map(is_held_out, tests)) and not any(map(is_held_out, trains))


def test_membership_is_pinned():
    """Changing the hash would leak yesterday's test items into tomorrow's training data."""
    prompts = [f"{left}+{right}" for left in range(1, 10) for right in range(1, 10)]
    assert [prompt for prompt in prompts if is_held_out(prompt)] == PINNED


PINNED = ["1+5", "1+6", "2+7", "3+4", "3+7", "4+4", "4+9", "5+6", "5+8", "6+2", "6+3", "7+1", "7+6", "8+5"]


def test_same_seed_same_items():
    assert split_items(50, 5, seed=3) == split_items(50, 5, seed=3)
    assert split_items(50, 5, seed=3) != split_items(50, 5, seed=4)


def test_the_count_is_exact_and_all_of_it_can_be_drawn():
    spec = ArithmeticSpec(min_steps=1, max_steps=2, max_operand=4, max_value=12)
    total = count_expressions(spec)
    values = range(1, 5)
    brute = {
        text for a in values for b in values for first in "+-*" for text in [f"{a}{first}{b}"] if abs(eval(text)) <= 12
    }
    held = sum(map(is_held_out, brute))
    assert count_expressions(ArithmeticSpec(min_steps=1, max_steps=1, max_operand=4, max_value=12)) == len(brute)
    small = ArithmeticSpec(min_steps=1, max_steps=1, max_operand=4, max_value=12)
    train, test = split_items(len(brute) - held, held, seed=0, spec=small)
    assert {item.prompt for item in train + test} == brute
    with pytest.raises(DataError, match=rf"asked for {total} \+ 1 unique items, but only {total} "):
        split_items(total, 1, seed=0, spec=spec)
    with pytest.raises(DataError, match=r"asked for \d+ unique held-out items, found \d+ among"):
        split_items(1, total // 2, seed=0, spec=spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operations": "+/"}, "operations is '\\+/'"),
        ({"operations": ""}, "operations is ''"),
        ({"operations": "++"}, "expected each one once"),
        ({"min_steps": 3, "max_steps": 2}, "min_steps is 3 and max_steps 2"),
        ({"min_steps": 0}, "min_steps is 0"),
        ({"max_operand": 100}, "max_operand is 100 and max_value 99"),
    ],
)
def test_bad_specs_are_named(options, message):
    with pytest.raises(DataError, match=message):
        ArithmeticSpec(**options)


def test_difficulties_are_balanced():
    train, _ = split_items(3000, 1, seed=0, spec=ArithmeticSpec(min_steps=3, max_steps=5))
    counts = np.bincount([len(item.steps) for item in train])[3:]
    assert counts.min() > 900
