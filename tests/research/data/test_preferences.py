"""Preference shapes, and pairs that state no preference."""

import pytest

from research.core.errors import DataError
from research.data.chat import Message
from research.data.jsonl import read_records
from research.data.preferences import Judged, Preference, Ranking, parse_judged, parse_preference, parse_ranking

PAIR = Preference((Message("user", "Hi"),), Message("assistant", "Hello!"), Message("assistant", "No."))
USER = {"role": "user", "content": "Hi"}
GOOD = {"role": "assistant", "content": "Hello!"}
BAD = {"role": "assistant", "content": "No."}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello!"},
            "rejected": {"from": "gpt", "value": "No."},
        },
    ],
)
def test_shapes(record):
    assert parse_preference(record, where="r") == PAIR


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "Hi", "chosen": "a"}, "f:3: found the keys prompt, chosen, expected prompt"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "f:3: chosen and rejected are equal"),
        ({"chosen": "a", "rejected": "b"}, "f:3: has no prompt"),
        ({"chosen": [USER, GOOD], "rejected": [BAD]}, "do not continue the same prompt"),
        ({"prompt": "Ho", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "do not continue the same prompt"),
        ({"prompt": "Hi", "chosen": [USER], "rejected": "b"}, "chosen ends with a user turn"),
        ({"prompt": [USER, GOOD], "chosen": "a", "rejected": "b"}, "the prompt ends with an assistant turn"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": "2"}, "f:3: margin: got '2', expected a number"),
        (
            {"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": float("nan")},
            "f:3: margin: got nan, expected a number of at most 3e",
        ),
        (
            {"prompt": "Hi", "chosen": "a", "rejected": "b", "label_probability": 1.5},
            "f:3: label_probability: got 1.5, expected a number from 0 to 1",
        ),
        (
            {"prompt": "Hi", "chosen": "a", "rejected": "b", "label_probability": True},
            "f:3: label_probability: got True, expected a number",
        ),
    ],
)
def test_bad_pairs_are_named(record, message):
    with pytest.raises(DataError, match=message):
        parse_preference(record, where="f:3")


def test_margin_and_probability_are_optional():
    record = {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."}
    assert (PAIR.margin, PAIR.label_probability) == (0.0, 1.0)
    assert parse_preference({**record, "margin": None, "label_probability": None}, where="r") == PAIR
    told = parse_preference({**record, "margin": 2, "label_probability": 0.75}, where="r")
    assert (told.margin, told.label_probability) == (2.0, 0.75)


def test_ranking_shapes():
    a, b, c = (Message("assistant", text) for text in "abc")
    record = {"prompt": "Hi", "completions": ["a", [{"role": "assistant", "content": "b"}], "c"]}
    expected = Ranking((Message("user", "Hi"),), (a, b, c), (1, 0, 1))
    assert parse_ranking({**record, "ranks": [2, -1, 2]}, where="r") == expected
    pair = parse_ranking({"prompt": "Hi", "chosen": "a", "rejected": "b"}, where="r")
    assert pair == Ranking((Message("user", "Hi"),), (a, b), (0, 1))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "Hi"}, "f:3: found the keys prompt, expected prompt.completions.ranks or"),
        (
            {"prompt": "Hi", "completions": ["a"], "ranks": [0]},
            "f:3: completions: expected a list of at least two, got ",
        ),
        (
            {"prompt": "Hi", "completions": ["a", "b"], "ranks": [0]},
            "f:3: ranks: found 1 ranks for 2 completions, expected one each",
        ),
        (
            {"prompt": "Hi", "completions": ["a", "b"], "ranks": [0, 0.5]},
            r"f:3: ranks\[1\]: got 0.5, expected an integer, lower is better",
        ),
        (
            {"prompt": "Hi", "completions": ["a", "b"], "ranks": [3, 3]},
            "f:3: ranks: all are 3, so the ranking states no preference",
        ),
        (
            {"prompt": "Hi", "completions": ["a", "b", "a"], "ranks": [0, 1, 2]},
            r"f:3: completions\[2\] equals an earlier one, but its rank is 2 and not 0",
        ),
        (
            {"prompt": "Hi", "completions": ["a", [USER, GOOD]], "ranks": [0, 1]},
            r"f:3: completions\[1\]: found turns by user, assistant, expected one assistant turn",
        ),
        (
            {"prompt": [USER, GOOD], "completions": ["a", "b"], "ranks": [0, 1]},
            "f:3: the prompt ends with an assistant turn",
        ),
    ],
)
def test_bad_rankings_are_named(record, message):
    with pytest.raises(DataError, match=message):
        parse_ranking(record, where="f:3")


def test_judged_shapes():
    prompt = (Message("user", "Hi"),)
    for label in (True, False):
        one = parse_judged({"prompt": "Hi", "completion": "a", "label": label}, where="r")
        assert one == (Judged(prompt, Message("assistant", "a"), label),)
    pair = parse_judged({"prompt": "Hi", "chosen": "a", "rejected": "b"}, where="r")
    assert pair == (Judged(prompt, Message("assistant", "a"), True), Judged(prompt, Message("assistant", "b"), False))
    with pytest.raises(DataError, match="f:3: label: got 1, expected true .desirable. or false"):
        parse_judged({"prompt": "Hi", "completion": "a", "label": 1}, where="f:3")
    with pytest.raises(DataError, match="f:3: found the keys prompt, completion, expected prompt.completion.label or"):
        parse_judged({"prompt": "Hi", "completion": "a"}, where="f:3")
    with pytest.raises(DataError, match="f:3: chosen and rejected are equal"):
        parse_judged({"prompt": "Hi", "chosen": "a", "rejected": "a"}, where="f:3")


def test_the_shared_pairs_parse(shared_data):
    pairs = [
        parse_preference(record, where=f"{number}")
        for number, record in read_records(shared_data / "preferences_300.json")
    ]
    assert len(pairs) == 300
