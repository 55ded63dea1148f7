"""A step is a non-blank line, in text and in tokens alike; labels match steps or are refused."""

import math

import numpy as np
import pytest

from research.core.errors import DataError
from research.data.chat import Message
from research.data.jsonl import read_records
from research.data.steps import LabelledSteps, parse_steps, step_end_mask, step_split


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", []),
        ("\n \n", []),
        ("a", ["a"]),
        ("a\n", ["a"]),
        ("1+1=2\n#### 2", ["1+1=2", "#### 2"]),
        ("\n a\n\n\tb \n", [" a", "\tb "]),
    ],
)
def test_steps_are_the_lines_that_are_not_blank(text, steps):
    assert step_split(text) == steps


def random_text(rng):
    lines = ["", " ", "3+4=7", "é→", "so x = 12.", "  #### 9", "\t", "the end "]
    return "\n".join(rng.choice(lines) for _ in range(int(rng.integers(1, 8))))


@pytest.mark.parametrize("seed", range(52))
def test_tokens_and_text_agree_on_where_steps_end(tokenizer, seed):
    """Rows of a prompt, a solution, perhaps its end of turn, and padding; the expected ends, text by text."""
    rng = np.random.default_rng(seed)
    rows, masks, expected = [], [], []
    for index in range(4):
        text = random_text(rng) if index or seed % 7 else ""
        content = tokenizer.encode(text) + [tokenizer.im_end_id] * int(rng.integers(2))
        prompt = tokenizer.encode("a\nb\n")
        ends = [False] * 64
        start = 0
        for at, token in enumerate(content):
            line = tokenizer.decode(content[start : at + 1])
            if token == tokenizer.piece_id("\n") or at == len(content) - 1:
                ends[len(prompt) + at] = bool(line.strip())
                start = at + 1
        padding = tokenizer.encode("c\n" * 40)[: 64 - len(prompt) - len(content)]
        rows.append(prompt + content + padding)
        masks.append([False] * len(prompt) + [True] * len(content) + [False] * len(padding))
        expected.append(ends)
        assert sum(ends) == len(step_split(text))
    found = step_end_mask(np.array(rows), tokenizer, np.array(masks))
    assert found.dtype == np.bool_
    np.testing.assert_array_equal(found, expected)
    for row in range(4):  # rows do not see each other, and a single row is a case of many
        alone = step_end_mask(np.array(rows[row]), tokenizer, np.array(masks[row]))
        np.testing.assert_array_equal(alone, expected[row])
        cut = np.array(rows[row])[np.array(masks[row])]
        np.testing.assert_array_equal(step_end_mask(cut, tokenizer), np.array(expected[row])[np.array(masks[row])])


def test_the_end_of_turn_ends_the_last_step_only_where_no_line_break_did(tokenizer):
    end = tokenizer.im_end_id
    for text, last in (("a\nb", True), ("a\nb\n", False), ("a\nb\n \n", False)):
        tokens = np.array([*tokenizer.encode(text), end])
        mask = step_end_mask(tokens, tokenizer)
        assert (mask[-1], mask.sum()) == (last, 2)
    truncated = np.array(tokenizer.encode("a\nb c"))
    assert step_end_mask(truncated, tokenizer)[-1]


def test_markup_alone_is_no_step(tokenizer):
    think, end = tokenizer.piece_id("<think>"), tokenizer.im_end_id
    tokens = np.array([think, *tokenizer.encode("\na\n"), end])
    assert step_end_mask(tokens, tokenizer).tolist() == [False, False, False, True, False]


def test_a_mask_of_another_shape_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"mask: got shape \(3,\), expected that of tokens, \(4,\)"):
        step_end_mask(np.zeros(4, int), tokenizer, np.ones(3, bool))


PROMPT = (Message("user", "2+2+1"),)


@pytest.mark.parametrize(
    ("record", "labels"),
    [
        ({"labels": [1, 0]}, (1.0, 0.0)),
        ({"labels": [True, 0.25]}, (1.0, 0.25)),
        ({"labels": [None, False]}, (None, 0.0)),
        ({"labels": [math.nan, 1.0]}, (None, 1.0)),
        ({"mistake_index": None}, (1.0, 1.0)),
        ({"mistake_index": 0}, (0.0, 0.0)),
        ({"mistake_index": 1}, (1.0, 0.0)),
    ],
)
def test_label_shapes(record, labels):
    key = "prompt" if "labels" in record else "input"
    parsed = parse_steps({key: "2+2+1", "steps": ["2+2=4", "4+1=6"], **record}, where="r")
    assert parsed == LabelledSteps(PROMPT, ("2+2=4", "4+1=6"), labels)
    assert parsed.solution == "2+2=4\n4+1=6"


def test_line_breaks_inside_a_step_become_spaces():
    record = {"prompt": "2+2+1", "steps": ["First,\n\n  2+2=4\n", "\n5"], "labels": [1, 1]}
    assert parse_steps(record, where="r").steps == ("First, 2+2=4", "5")


BASE = {"prompt": "p", "steps": ["a", "b"], "labels": [1, 0]}
BBM = {"input": "p", "steps": ["a", "b"], "mistake_index": 1}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "p", "steps": ["a"]}, "f:3: found the keys prompt, steps, expected prompt.steps.labels, or"),
        ({**BASE, "labels": [1]}, "f:3: labels: found 1 labels for 2 steps, expected one label a step"),
        ({**BASE, "labels": 1}, "f:3: labels: found 1 for 2 steps, expected one label a step"),
        ({**BASE, "labels": [1, 2]}, r"f:3: labels\[1\]: got 2, expected a number from 0 .wrong. to 1"),
        ({**BASE, "labels": [-0.1, 1]}, r"f:3: labels\[0\]: got -0.1, expected a number from 0"),
        ({**BASE, "labels": ["+", "-"]}, r"f:3: labels\[0\]: got '\+', expected a number from 0"),
        ({**BASE, "labels": [None, None]}, "f:3: labels: all 2 are null, expected at least one label"),
        ({**BASE, "steps": []}, r"f:3: steps: expected a list of at least one step, got \[\]"),
        ({**BASE, "steps": "a\nb"}, "f:3: steps: expected a list of at least one step, got 'a"),
        ({**BASE, "steps": ["a", " \n"]}, r"f:3: steps\[1\]: expected non-empty text, got ' "),
        ({**BASE, "prompt": [{"role": "assistant", "content": "a"}]}, "f:3: the prompt ends with an assistant turn"),
        (
            {**BBM, "mistake_index": 2},
            "f:3: mistake_index: got 2, expected null or an index from 0 to 1 because there are 2 steps",
        ),
        ({**BBM, "mistake_index": -1}, "f:3: mistake_index: got -1, expected null or an index"),
        ({**BBM, "mistake_index": True}, "f:3: mistake_index: got True, expected null or an index"),
        ({**BBM, "mistake_index": "1"}, "f:3: mistake_index: got '1', expected null or an index"),
    ],
)
def test_labels_that_do_not_match_are_named(record, message):
    with pytest.raises(DataError, match=message):
        parse_steps(record, where="f:3")


@pytest.mark.parametrize("name", ["bbm_multistep_arithmetic.jsonl", "bbm_logical_deduction.jsonl"])
def test_big_bench_mistake_parses(shared_data, tokenizer, name):
    for number, record in read_records(shared_data / name):
        parsed = parse_steps(record, where=f"{number}")
        right = [record["mistake_index"] is None or n < record["mistake_index"] for n in range(len(parsed.steps))]
        assert [label == 1.0 for label in parsed.labels] == right
        assert parsed.steps == tuple(record["steps"])
        if number <= 40:
            tokens = np.array(tokenizer.encode(parsed.solution))
            assert step_end_mask(tokens, tokenizer).sum() == len(parsed.labels)
