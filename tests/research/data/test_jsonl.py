"""JSONL and JSON lists: numbering, and one clear sentence for each bad input."""

import pytest

from research.core.errors import DataError
from research.data.jsonl import read_records


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_lines_keep_their_numbers(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n\n{"a": "x\u2028y"}\n')
    assert list(read_records(path)) == [(1, {"a": 1}), (3, {"a": "x\u2028y"})]


def test_json_list(tmp_path):
    path = write(tmp_path, "a.json", '[{"a": 1},\n {"a": 2}]')
    assert list(read_records(path)) == [(1, {"a": 1}), (2, {"a": 2})]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", r"a\.jsonl: holds no records"),
        ("a.jsonl", "\n \n", r"a\.jsonl: holds no records"),
        ("a.json", "", r"a\.json: holds no records"),
        ("a.json", "[]", r"a\.json: holds no records"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a\.jsonl:2: is not valid JSON"),
        ("a.jsonl", '{"a": "b', r"\(Unterminated string starting at column 7\)"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"a\.jsonl:2: expected a JSON object, got list"),
        ("a.json", '[{"a": 1}, 3]', r"a\.json:2: expected a JSON object, got int"),
        ("a.json", '{"a": 1}', r"a\.json: expected a JSON list of records, got dict"),
        ("a.json", '[{"a": 1}\n', r"a\.json:2: is not valid JSON"),
    ],
)
def test_bad_input_is_named(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message):
        list(read_records(write(tmp_path, name, text)))


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read \(No such file"):
        list(read_records(tmp_path / "none.jsonl"))
    path = tmp_path / "b.jsonl"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match="is not UTF-8 text .* at byte 7"):
        list(read_records(path))
