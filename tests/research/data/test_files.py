"""Files of users as prepared data: every column, one split for all of them, and bad files named by line."""

import json

import pytest

from research.core.errors import DataError
from research.data.chat import Message, normalize_record
from research.data.files import PROMPTS, prepare_file
from research.data.jsonl import read_records
from research.data.preferences import parse_preference
from research.data.split import Split, prompt_key
from research.data.steps import parse_steps
from research.data.store import file_hash
from research.data.text_corpus import prepare_text_corpus, split_document

SPLIT = Split(5)


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def both(data):
    return [*data.train, *data.validation]


def folders(data_dir):
    return sorted(path.name for path in data_dir.glob("rows/*"))


RECORDS = {
    "chat": lambda prompt: {"prompt": prompt, "completion": "c", "difficulty": 3, "tags": ["a", None], "id": 1.5},
    "preferences": lambda prompt: {"prompt": prompt, "chosen": "a", "rejected": "b", "margin": 0.5},
    "unpaired": lambda prompt: {"prompt": prompt, "completion": "a", "label": False, "rater": {"name": "x"}},
    "rankings": lambda prompt: {"prompt": prompt, "completions": ["a", "b"], "ranks": [2**63, -1]},
    "steps": lambda prompt: {"prompt": prompt, "steps": ["a", "é b"], "labels": [None, 0.25]},
}


@pytest.mark.parametrize("kind", list(RECORDS))
def test_rows_come_back_whole_and_one_prompt_is_never_on_both_sides(tmp_path, kind):
    records = [RECORDS[kind](f"p{n % 40}") for n in range(100)]
    data = prepare_file(kind, tmp_path / "out", write_jsonl(tmp_path / "in.jsonl", records), SPLIT)
    assert sorted(map(json.dumps, both(data))) == sorted(map(json.dumps, records))
    sides = [{record["prompt"] for record in part} for part in (data.train, data.validation)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 40
    assert data.train.place(0).startswith("in.jsonl:")


def test_what_one_file_holds_out_all_files_hold_out(tmp_path):
    """Problems and preferences of the same prompts; each file's prompts differ in blanks, forms and system turns."""
    plain = [f"What is  {n} + {n}?" for n in range(99)]

    def told(prompt):
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]
        return {"prompt": turns, "chosen": "a", "rejected": "b"}

    variants = {
        "chat": [RECORDS["chat"](prompt) for prompt in plain],
        "preferences": [told(prompt + " ") for prompt in plain],
        "rankings": [RECORDS["rankings"](prompt.replace("  ", "\u00a0")) for prompt in plain],
        "steps": [RECORDS["steps"](f"\n{prompt}\t".replace("+", "\uff0b")) for prompt in plain],
    }
    held, trained = {}, {}
    for kind, records in variants.items():
        path = write_jsonl(tmp_path / f"{kind}.jsonl", records)
        data = prepare_file(kind, tmp_path / "out", path, SPLIT)
        keys = [{prompt_key(PROMPTS[kind](r, "r")) for r in part} for part in (data.train, data.validation)]
        trained[kind], held[kind] = keys
    assert len(held["chat"]) > 10
    for kind in variants:
        assert held[kind] == held["chat"] and not trained[kind] & held["chat"]


def test_case_is_part_of_a_prompt():
    assert prompt_key([Message("user", "Polish")]) != prompt_key([Message("user", "polish")])


def test_a_split_that_would_be_empty_says_which_share_works(tmp_path):
    records = [RECORDS["chat"](f"p{n}") for n in range(6)]
    path = write_jsonl(tmp_path / "in.jsonl", records)
    empty = next(n for n in range(50, 99) if not any(Split(n).holds_out(f"p{k}") for k in range(6)))
    with pytest.raises(DataError, match=r"none of its 6 records falls into the validation split; (\d+) would") as e:
        prepare_file("chat", tmp_path / "out", path, Split(empty))
    advised = int(str(e.value).split("split; ")[1].split()[0])
    assert len(prepare_file("chat", tmp_path / "out", path, Split(advised)).validation) >= 1


def test_every_part_of_a_message_survives(tmp_path):
    turns = [
        {"role": "user", "content": "é\u2581 x\n"},
        {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": ["f(1)", "g(2)"]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two", "weight": 0},
    ]
    other = {"prompt": "p1", "completion": "c"}
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": turns}, *({**other, "prompt": f"{n}"} for n in range(9))])
    (record,) = [r for r in both(prepare_file("chat", tmp_path / "out", path, Split(3))) if "messages" in r]
    assert normalize_record(record, where="r") == (
        Message("user", "é\u2581 x\n"),
        Message("assistant", "", "hm", ("f(1)", "g(2)")),
        Message("tool", "2"),
        Message("assistant", "two", train=False),
    )


def test_changed_files_get_a_new_folder(tmp_path):
    path = tmp_path / "chat.jsonl"
    versions = set()
    for completion in ("b", "c"):
        write_jsonl(path, [{"prompt": f"{n}", "completion": completion} for n in range(20)])
        data = prepare_file("chat", tmp_path / "out", path, SPLIT)
        assert {record["completion"] for record in both(data)} == {completion}
        versions.add(data.version)
    assert len(versions) == len(folders(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("chat", b"", r"d\.jsonl: holds no records"),
        ("chat", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', r"d\.jsonl:2: found the keys prompt, exp"),
        ("chat", b'{"prompt": "a", "completion": "b"}\nnope\n', r"d\.jsonl:2: is not valid JSON"),
        ("chat", b'{"messages": [{"role": "user", "content": "a"}]}\n', r"d\.jsonl:1: the last of 1 turns is by user"),
        ("chat", b'{"prompt": " ", "completion": "b"}\n', r"d\.jsonl:1: the prompt is empty"),
        ("chat", b'{"prompt": "a\xff", "completion": "b"}\n', r"d\.jsonl: is not UTF-8 text .* at byte 13"),
        ("chat", b'{"prompt": "a", "completion": "b", "n": 1' + b"0" * 5000 + b"}", r"d\.jsonl:1: cannot be read as"),
        ("chat", b"[" * 100_000, r"d\.jsonl:1: is nested too deeply"),
        ("chat", b'{"prompt": "a\\ud800", "completion": "b"}\n', r"d\.jsonl:1: holds half of a surrogate pair"),
        ("preferences", b'{"prompt": "a", "chosen": "b", "rejected": "b"}', r"d\.jsonl:1: chosen and rejected are eq"),
        (
            "preferences",
            b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1' + b"0" * 400 + b"}",
            r"d\.jsonl:1: margin: got 1000.*, expected a number of at most 3e\+38",
        ),
        ("preferences", b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": []}', r"d\.jsonl:1: margin: got "),
        ("steps", b'{"prompt": "p", "steps": ["a"], "labels": []}', r"d\.jsonl:1: labels: found 0 labels for 1 steps"),
        ("steps", b'{"input": "p", "steps": ["a"], "mistake_index": 1}', r"d\.jsonl:1: mistake_index: got 1"),
        ("rankings", b'{"prompt": "p", "completions": ["a", "b"], "ranks": [0]}', r"d\.jsonl:1: ranks: found 1 ranks"),
        ("unpaired", b'{"prompt": "p", "completion": "a", "label": null}', r"d\.jsonl:1: label: got None"),
    ],
)
def test_bad_files_name_the_line_and_leave_nothing_behind(tmp_path, kind, content, message):
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare_file(kind, tmp_path / "out", tmp_path / "d.jsonl", SPLIT)
    assert folders(tmp_path / "out") == []


@pytest.mark.parametrize("read", [file_hash, lambda path: list(read_records(path))])
def test_paths_that_cannot_be_read(tmp_path, read):
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read \(No such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"a\\x00b\.jsonl': cannot be read \(embedded null"):
        read(tmp_path / "a\0b.jsonl")


def test_shared_files_round_trip(tmp_path, shared_data):
    data = prepare_file("preferences", tmp_path, shared_data / "preferences_300.json", SPLIT)
    original = json.loads((shared_data / "preferences_300.json").read_text())
    expected = {repr(parse_preference(record, where="r")) for record in original}
    assert {repr(parse_preference(record, where="r")) for record in both(data)} == expected
    name = "bbm_multistep_arithmetic.jsonl"
    data = prepare_file("steps", tmp_path, shared_data / name, SPLIT)
    expected = {repr(parse_steps(record, where="r")) for _, record in read_records(shared_data / name)}
    assert {repr(parse_steps(record, where="r")) for record in both(data)} == expected


def test_text_documents_join_to_the_text(tmp_path):
    text = "".join(f"Paragraph {n}.\nSecond line of {n}.\n\n" for n in range(200))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.txt").write_text(text)
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": f"line {n}"} for n in range(5)])
    (tmp_path / "in" / "ignored.bin").write_bytes(b"\xff")
    data = prepare_text_corpus(tmp_path / "out", str(tmp_path / "in"), SPLIT, max_characters=300)
    records = sorted(both(data), key=lambda record: (record["name"], text.find(record["text"])))
    assert [record["name"] for record in records[:5]] == [f"a.jsonl:{n}" for n in range(1, 6)]
    assert "".join(record["text"] for record in records[5:]) == text
    assert all(len(record["text"]) <= 300 for record in records)
    assert all(record["text"].startswith("Paragraph") for record in records[5:])


def test_files_of_one_name_in_two_folders_are_two(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / "x.txt").write_text("".join(f"{folder} {n}.\n\n" for n in range(40)))

    def prepared():
        return prepare_text_corpus(tmp_path / "out", str(tmp_path / "in"), SPLIT, max_characters=12)

    first = prepared()
    assert {record["name"] for record in both(first)} == {"a/x.txt", "b/x.txt"}
    (tmp_path / "in" / "a" / "x.txt").write_text("".join(f"other {n}.\n\n" for n in range(40)))
    second = prepared()
    assert second.version != first.version
    assert any("other" in record["text"] for record in both(second))


def test_text_split_is_by_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"Paragraph {n}.\n\n" for n in range(300)))
    data = prepare_text_corpus(tmp_path / "out", str(path), Split(10), max_characters=40)
    held = {record["text"] for record in data.validation}
    assert 5 < len(held) < 40
    path.write_text("".join(f"Paragraph {n}.\n\n" for n in range(200)))
    shorter = prepare_text_corpus(tmp_path / "out", str(path), Split(10), max_characters=40)
    assert not held & {record["text"] for record in shorter.train}


@pytest.mark.parametrize("text", ["", "abc", "\n\n\n", "a\n\n" * 9, "x" * 100, "ab\ncd\n" * 20 + "y" * 50])
def test_split_document_is_lossless(text):
    parts = split_document(text, 16)
    assert "".join(parts) == text
    assert all(0 < len(part) <= 16 for part in parts)


def test_the_standard_library_is_the_default_corpus(tmp_path):
    data = prepare_text_corpus(tmp_path, "", SPLIT, max_bytes=200_000)
    assert data.details["stdlib"]["python"].startswith("3.")
    assert sum(len(record["text"]) for record in both(data)) > 100_000


def test_bad_corpora_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: the folder holds no \.txt"):
        prepare_text_corpus(tmp_path / "out", str(tmp_path / "empty"), SPLIT)
    (tmp_path / "empty" / "blank.txt").write_text("\n \n")
    with pytest.raises(DataError, match="empty: holds no records, expected at least one"):
        prepare_text_corpus(tmp_path / "out", str(tmp_path / "empty"), SPLIT)
    (tmp_path / "one.txt").write_text("one document")
    with pytest.raises(DataError, match="none of its 1 records falls into the .* it needs more prompts"):
        prepare_text_corpus(tmp_path / "out", str(tmp_path / "one.txt"), SPLIT)
    with pytest.raises(DataError, match=r"one\.bin: expected a \.txt"):
        prepare_text_corpus(tmp_path / "out", str(tmp_path / "one.bin"), SPLIT)
    with pytest.raises(DataError, match="data.text.max_bytes applies to the standard library"):
        prepare_text_corpus(tmp_path / "out", str(tmp_path / "one.txt"), SPLIT, max_bytes=9)
    with pytest.raises(DataError, match="cannot be read"):
        prepare_text_corpus(tmp_path / "out", str(tmp_path / "no\0.txt"), SPLIT)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:1: found the keys prompt, expected text"):
        prepare_text_corpus(tmp_path / "out", str(tmp_path / "bad.jsonl"), SPLIT)
