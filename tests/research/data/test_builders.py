"""Prepared data sets: round trips, folders named by content, reuse, disjoint splits, bad inputs."""

import json

import pytest

from research.core.errors import DataError
from research.data.builders import (
    ChatSpec,
    FileSpec,
    TextSpec,
    base,
    prepare_arithmetic,
    prepare_chat_sft,
    prepare_preferences,
    prepare_text_corpus,
)
from research.data.builders.text_corpus import split_document
from research.data.chat import Message, normalize_record
from research.data.preferences import parse_preference
from research.tasks.arithmetic.problems import ArithmeticSpec


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def folders(data_dir):
    return sorted(str(path.relative_to(data_dir)) for path in data_dir.glob("*/*/*"))


def test_arithmetic_is_written_once_and_named_by_its_parameters(tmp_path, monkeypatch, capsys):
    first = prepare_arithmetic(tmp_path, n_train=50, n_test=5, seed=0)
    assert (len(first.train), len(first.test)) == (50, 5)
    record = first.train[3]
    assert set(record) == {"prompt", "completion", "answer", "steps", "difficulty", "kind"}
    assert record["completion"] == "\n".join([*record["steps"], f"#### {record['answer']}"])
    assert record["difficulty"] == len(record["steps"])
    assert not {item["prompt"] for item in first.train} & {item["prompt"] for item in first.test}
    assert first.details["records"] == {"train": 50, "test": 5}

    monkeypatch.setattr(base, "_write", lambda _: pytest.fail("written twice"))
    again = prepare_arithmetic(tmp_path, n_train=50, n_test=5, seed=0)
    assert (again.version, again.details) == (first.version, first.details)
    assert list(again.train) == list(first.train) == [first.train[index] for index in range(50)]
    monkeypatch.undo()
    other = prepare_arithmetic(tmp_path, n_train=50, n_test=5, seed=0, spec=ArithmeticSpec(max_value=50))
    assert other.version != first.version
    assert len(folders(tmp_path)) == 2
    assert not list(tmp_path.rglob("incomplete*"))
    assert capsys.readouterr() == ("", "")


def test_a_record_outside_the_split_and_a_split_that_is_not_there(tmp_path):
    data = prepare_arithmetic(tmp_path, n_train=5, n_test=2, seed=0)
    for index in (-1, 5):
        with pytest.raises(IndexError, match=f"record {index} of 5"):
            data.train[index]
    with pytest.raises(DataError, match="has no validation split, expected one of train, test"):
        _ = data.validation


def test_chat_round_trip_and_content_splits(tmp_path):
    records = [{"question": f"q{n}", "answer": f"1+1=<<1+1=2>>2\n#### {n}"} for n in range(60)]
    records += records[:20]  # duplicates must not straddle the splits
    path = write_jsonl(tmp_path / "chat.jsonl", records)
    data = prepare_chat_sft(tmp_path / "out", ChatSpec(path, validation_one_in=5))
    assert len(data.train) + len(data.validation) == 80
    turns = [
        [normalize_record(record, where="r") for record in part] for part in (data.train, data.validation)
    ]
    assert not {pair[0] for pair in turns[0]} & {pair[0] for pair in turns[1]}
    assert turns[0][0][1].content.startswith("1+1=2\n")
    assert data.train[0]["answer"].startswith("1+1=<<1+1=2>>2")


def test_every_part_of_a_message_survives(tmp_path):
    turns = [
        {"role": "user", "content": "é\u2581 x\n"},
        {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": ["f(1)", "g(2)"]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two"},
    ]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": turns}])
    data = prepare_chat_sft(tmp_path / "out", ChatSpec(path, validation_one_in=0))
    assert normalize_record(data.train[0], where="r") == (
        Message("user", "é\u2581 x\n"),
        Message("assistant", "", "hm", ("f(1)", "g(2)")),
        Message("tool", "2"),
        Message("assistant", "two"),
    )


def test_changed_files_get_a_new_folder(tmp_path):
    path = tmp_path / "chat.jsonl"
    spec = ChatSpec(str(path), validation_one_in=0)
    write_jsonl(path, [{"prompt": "a", "completion": "b"}])
    first = prepare_chat_sft(tmp_path / "out", spec)
    write_jsonl(path, [{"prompt": "a", "completion": "c"}])
    second = prepare_chat_sft(tmp_path / "out", spec)
    assert first.version != second.version
    assert second.train[0]["messages"][1]["content"] == "c"
    assert first.train[0]["messages"][1]["content"] == "b"
    assert len(folders(tmp_path / "out")) == 2


def test_preferences_round_trip(tmp_path, shared_data):
    spec = FileSpec(str(shared_data / "preferences_300.json"))
    data = prepare_preferences(tmp_path, spec)
    assert data.details["records"]["train"] + data.details["records"]["validation"] == 300
    original = json.loads((shared_data / "preferences_300.json").read_text())
    expected = {repr(parse_preference(record, where="r")) for record in original}
    found = [repr(parse_preference(record, where="r")) for part in data.splits.values() for record in part]
    assert set(found) == expected and len(found) == 300


def test_text_documents_join_to_the_text(tmp_path):
    text = "".join(f"Paragraph {n}.\nSecond line of {n}.\n\n" for n in range(200))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.txt").write_text(text)
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": f"line {n}"} for n in range(5)])
    (tmp_path / "in" / "ignored.bin").write_bytes(b"\xff")
    spec = TextSpec(str(tmp_path / "in"), max_characters=300, validation_one_in=0)
    data = prepare_text_corpus(tmp_path / "out", spec)
    records = list(data.train)
    assert [record["name"] for record in records[:5]] == [f"a.jsonl:{n}" for n in range(1, 6)]
    assert "".join(record["text"] for record in records[5:]) == text
    assert all(len(record["text"]) <= 300 for record in records)
    assert all(record["text"].startswith("Paragraph") for record in records[5:])


def test_text_split_is_by_content(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"Paragraph {n}.\n\n" for n in range(300)))
    spec = TextSpec(str(tmp_path / "a.txt"), max_characters=40, validation_one_in=10)
    data = prepare_text_corpus(tmp_path / "out", spec)
    held = {record["text"] for record in data.validation}
    assert 5 < len(held) < 40
    (tmp_path / "a.txt").write_text("".join(f"Paragraph {n}.\n\n" for n in range(200)))
    shorter = prepare_text_corpus(tmp_path / "out", spec)
    assert not held & {record["text"] for record in shorter.train}


@pytest.mark.parametrize("text", ["", "abc", "\n\n\n", "a\n\n" * 9, "x" * 100, "ab\ncd\n" * 20 + "y" * 50])
def test_split_document_is_lossless(text):
    parts = split_document(text, 16)
    assert "".join(parts) == text
    assert all(0 < len(part) <= 16 for part in parts)


def test_the_standard_library_is_the_default_corpus(tmp_path):
    data = prepare_text_corpus(tmp_path, TextSpec(max_bytes=200_000))
    assert data.details["stdlib"]["python"].startswith("3.")
    assert sum(len(record["text"]) for part in data.splits.values() for record in part) > 100_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"d\.jsonl: holds no records"),
        (
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n',
            r"d\.jsonl:2: found the keys prompt, expected",
        ),
        ('{"prompt": "a", "completion": "b"}\nnope\n', r"d\.jsonl:2: is not valid JSON"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', r"d\.jsonl:1: the last of 1 turns is by user"),
    ],
)
def test_bad_chat_files_leave_nothing_behind(tmp_path, content, message):
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        prepare_chat_sft(tmp_path / "out", ChatSpec(str(path), validation_one_in=0))
    assert folders(tmp_path / "out") == []


def test_bad_requests_are_named(tmp_path):
    equal = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    with pytest.raises(DataError, match=r"p\.jsonl:1: chosen and rejected are equal"):
        prepare_preferences(tmp_path / "out", FileSpec(equal))
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        prepare_chat_sft(tmp_path / "out", ChatSpec(str(tmp_path / "none.jsonl")))
    with pytest.raises(DataError, match="validation_one_in is 1, expected 0 or at least 2"):
        prepare_chat_sft(tmp_path / "out", ChatSpec(equal, validation_one_in=1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: the folder holds no \.txt"):
        prepare_text_corpus(tmp_path / "out", TextSpec(str(tmp_path / "empty")))
    (tmp_path / "empty" / "blank.txt").write_text("\n \n")
    with pytest.raises(DataError, match="empty: holds no records, expected at least one"):
        prepare_text_corpus(tmp_path / "out", TextSpec(str(tmp_path / "empty")))
    (tmp_path / "one.txt").write_text("one document")
    with pytest.raises(DataError, match="none of its 1 records falls into the"):
        prepare_text_corpus(tmp_path / "out", TextSpec(str(tmp_path / "one.txt")))
    with pytest.raises(DataError, match=r"one\.bin: expected a \.txt"):
        prepare_text_corpus(tmp_path / "out", TextSpec(str(tmp_path / "one.bin")))
    with pytest.raises(DataError, match="max_bytes applies to the standard library"):
        prepare_text_corpus(tmp_path / "out", TextSpec(str(tmp_path / "one.txt"), max_bytes=9))
    with pytest.raises(DataError, match="the test split of .* is empty"):
        prepare_arithmetic(tmp_path / "out", n_train=5, n_test=0, seed=0)


def test_a_failure_while_writing_leaves_no_folder(tmp_path, monkeypatch):
    def fail(self, split):
        yield 0, self.builder_config.splits[split][0]
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(base.RecordsBuilder, "_generate_examples", fail)
    with pytest.raises(RuntimeError, match="disk on fire"):
        prepare_arithmetic(tmp_path, n_train=5, n_test=2, seed=0)
    assert folders(tmp_path) == []
    monkeypatch.undo()
    assert len(prepare_arithmetic(tmp_path, n_train=5, n_test=2, seed=0).train) == 5


def test_losing_the_race_to_write_is_no_error(tmp_path, monkeypatch):
    reference = prepare_arithmetic(tmp_path / "a", n_train=5, n_test=2, seed=0)
    original = base._write

    def overtaken(builder):
        monkeypatch.setattr(base, "_write", original)
        prepare_arithmetic(tmp_path / "b", n_train=5, n_test=2, seed=0)  # another process, meanwhile
        exists = type(builder.data_path).exists
        hidden = {str(builder.data_path)}
        monkeypatch.setattr(
            type(builder.data_path), "exists", lambda self: str(self) not in hidden and exists(self)
        )
        original(builder)

    monkeypatch.setattr(base, "_write", overtaken)
    data = prepare_arithmetic(tmp_path / "b", n_train=5, n_test=2, seed=0)
    assert list(data.train) == list(reference.train)
