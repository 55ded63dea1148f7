"""Preference shapes, and pairs that state no preference."""

import pytest

from research.data.chat import Message
from research.data.jsonl import read_records
from research.data.preferences import Preference, parse_preference
from research.errors import DataError

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
        (
            {"prompt": "Ho", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "do not continue the same prompt",
        ),
        ({"prompt": "Hi", "chosen": [USER], "rejected": "b"}, "chosen ends with a user turn"),
        ({"prompt": [USER, GOOD], "chosen": "a", "rejected": "b"}, "the prompt ends with an assistant turn"),
        ({"prompt": "Hi", "chosen": "", "rejected": "b"}, "f:3: chosen: expected non-empty text, got ''"),
    ],
)
def test_bad_pairs_are_named(record, message):
    with pytest.raises(DataError, match=message):
        parse_preference(record, where="f:3")


def test_the_shared_pairs_parse(shared_data):
    pairs = [
        parse_preference(record, where=f"{number}")
        for number, record in read_records(shared_data / "preferences_300.json")
    ]
    assert len(pairs) == 300
