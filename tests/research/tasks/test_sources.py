"""Views of records, the tokenizer kept by content, and the questions that go with their answers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from experiments import base
from research.config.bridge import old_data
from research.config.resolve import resolve
from research.core.errors import DataError
from research.tasks.sources import Sources, View, answer_of, question_of, terse, worked_text
from tests.experiments.toy import PROBLEMS, shrink

RECORDS: list[Mapping[str, Any]] = [
    {"prompt": f"{i}+1", "completion": f"{i}+1={i + 1}\n#### {i + 1}", "answer": str(i + 1)}
    for i in range(200)
]


@pytest.fixture
def section(tmp_path: Path) -> dict[str, Any]:
    return old_data(resolve(shrink(base.get_config(), tmp_path)).tree["data"])


def test_a_view_is_the_first_so_many_records_changed() -> None:
    view = View(RECORDS, 3, lambda record: {"text": record["prompt"]})
    assert len(view) == 3 and view[2] == {"text": "2+1"}
    assert [record["text"] for record in view] == ["0+1", "1+1", "2+1"]
    assert len(View(RECORDS, 0)) == 200 and len(View(RECORDS, 999)) == 200
    for index in (3, -1):
        with pytest.raises(IndexError):
            view[index]


def test_terse_takes_the_steps_from_its_share_and_decides_by_content() -> None:
    found = [terse(0.5)(record)["completion"] for record in RECORDS]
    short = [text for text, record in zip(found, RECORDS, strict=True) if text != record["completion"]]
    assert 70 < len(short) < 130 and all(text.startswith("#### ") for text in short)
    assert found == [terse(0.5)(record)["completion"] for record in RECORDS]
    assert all(terse(0.0)(record) == record for record in RECORDS)
    assert all("\n" not in terse(1.0)(record)["completion"] for record in RECORDS)
    wider = [terse(0.8)(record)["completion"] for record in RECORDS]  # a larger share contains the smaller
    assert all("\n" not in w for f, w in zip(found, wider, strict=True) if "\n" not in f)


def test_questions_answers_and_worked_texts() -> None:
    assert question_of(RECORDS[4]) == "4+1" and answer_of(RECORDS[4]) == "5"
    assert worked_text(RECORDS[4]) == {"text": "4+1\n4+1=5\n#### 5"}
    chat = {"messages": [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "two\n#### 2"}]}
    assert question_of(chat) == "2?" and answer_of(chat) == "two\n#### 2"
    assert answer_of({"question": "Half of 6?", "answer": "3 is half\n#### 3"}).endswith("#### 3")


def test_the_tokenizer_is_trained_once_and_again_for_another_corpus(
    section: dict[str, Any], tmp_path: Path
) -> None:
    first = Sources(section, tmp_path / "data").tokenizer
    (model,) = (tmp_path / "data" / "tokenizers").iterdir()
    written = model.stat().st_mtime_ns
    assert Sources(section, tmp_path / "data").tokenizer.model == first.model
    assert model.stat().st_mtime_ns == written
    text = Path(section["text"]["path"])
    text.write_text(text.read_text(encoding="utf-8").replace("doc", "döc"), encoding="utf-8")
    other = Sources(section, tmp_path / "data").tokenizer
    assert other.model != first.model and len(list((tmp_path / "data" / "tokenizers").iterdir())) == 2


def test_given_tokenizers_are_loaded(section: dict[str, Any], tmp_path: Path) -> None:
    trained = Sources(section, tmp_path / "data").tokenizer
    trained.save(tmp_path / "mine.model")
    section["tokenizer"]["path"] = str(tmp_path / "mine.model")
    assert Sources(section, tmp_path / "elsewhere").tokenizer.model == trained.model
    assert not (tmp_path / "elsewhere").exists()


def test_versions_change_with_content(section: dict[str, Any], tmp_path: Path) -> None:
    before = Sources(section, tmp_path / "data").versions(("text", "problems"))
    assert before == Sources(section, tmp_path / "data").versions(("text", "problems"))
    section["problems"]["seed"] = 1
    after = Sources(section, tmp_path / "data").versions(("text", "problems"))
    assert after["text"] == before["text"] and after["problems"] != before["problems"]
    assert after["tokenizer"] == before["tokenizer"]  # characters come from the text alone


def test_problems_held_out_are_not_trained_on(section: dict[str, Any], tmp_path: Path) -> None:
    sources = Sources(section, tmp_path / "data")
    train = {record["prompt"] for record in sources.problems.train}
    assert len(train) == 64 and not train & {record["prompt"] for record in sources.held_out}
    section["problems"].update(kind="jsonl", path=str(tmp_path / "problems.jsonl"), validation_one_in=5)
    sources = Sources(section, tmp_path / "data")
    train = {question_of(record) for record in sources.problems.train}
    held = {question_of(record) for record in sources.held_out}
    assert not train & held and len(train | held) == PROBLEMS


@pytest.mark.parametrize("kind", ["problems", "preferences", "rankings", "steps"])
def test_a_file_that_is_not_named(section: dict[str, Any], tmp_path: Path, kind: str) -> None:
    section[kind].update(path="", kind="jsonl")
    with pytest.raises(DataError, match=rf"data\.{kind}\.path: got '', expected a JSONL file"):
        getattr(Sources(section, tmp_path / "data"), kind)


def test_a_terse_solution_keeps_its_last_step_and_label() -> None:
    records = [
        {"prompt": f"{i}+1", "steps": [f"{i}+1={i + 1}", f"#### {i + 1}"], "labels": [1.0, float(i % 2)]}
        for i in range(400)
    ]
    changed = [terse(0.5)(record) for record in records]
    short = [(a, b) for a, b in zip(records, changed, strict=True) if a != b]
    assert 140 < len(short) < 260 and terse(0.0)(records[0]) == records[0]
    for before, after in short:
        assert after["steps"] == before["steps"][-1:] and after["labels"] == before["labels"][-1:]


def test_terse_draws_each_side_of_a_pair_for_itself() -> None:
    def side(*lines: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": "\n".join(lines)}]

    pairs = [
        {"prompt": f"{i}", "chosen": side("a", f"#### {i}"), "rejected": side("b", "#### wrong")}
        for i in range(400)
    ]
    changed = [terse(0.5)(pair) for pair in pairs]
    bare = [
        [pair[key][0]["content"].startswith("####") for key in ("chosen", "rejected")] for pair in changed
    ]
    assert all(60 < bare.count([a, b]) < 140 for a in (True, False) for b in (True, False))
    assert terse(0.0)(pairs[0]) == pairs[0]
    same = {"prompt": "1", "chosen": side("a", "#### 1"), "rejected": side("b", "#### 1")}
    assert terse(1.0)(same) == same
