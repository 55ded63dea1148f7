"""The data of an experiment: one split for all sources, what is left out and said, the tokenizer kept by content."""

import dataclasses
import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from research.config.references import find
from research.config.sections import Data, Judged, Text, TokenizerSection
from research.core.errors import DataError
from research.data.chat import Message
from research.data.split import Split, prompt_key
from research.data.store import Prepared
from research.tasks.arithmetic.task import Arithmetic
from research.tasks.jsonl import Jsonl
from research.tasks.sources import Sources

LETTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
TASK = Arithmetic(train=64, test=8, max_steps=2)


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def section(tmp_path: Path) -> Data:
    path = write_jsonl(tmp_path / "text.jsonl", [{"text": f"doc {i} {LETTERS}"} for i in range(40)])
    return Data(validation_one_in=5, text=Text(path), tokenizer=TokenizerSection(vocab_size=0, model_type="char"))


def test_problems_held_out_are_not_trained_on(section: Data, tmp_path: Path) -> None:
    sources = Sources(TASK, section, tmp_path / "data")
    train = {record["prompt"] for record in sources.problems.train}
    assert len(train) == 64 and not train & {record["prompt"] for record in sources.held_out}
    records = [{"prompt": f"{i}+1", "completion": f"#### {i + 1}"} for i in range(40)]
    sources = Sources(Jsonl(write_jsonl(tmp_path / "p.jsonl", records)), section, tmp_path / "data")
    train, held = ({record["prompt"] for record in part} for part in (sources.problems.train, sources.held_out))
    assert not train & held and len(train | held) == 40


def test_no_file_trains_on_what_another_holds_out(section: Data, tmp_path: Path) -> None:
    """Once 86 of 99 held-out problems were in the preferences' training data."""
    problems = [{"prompt": f"What is {i}+1?", "completion": f"#### {i + 1}"} for i in range(400)]
    pairs = [{"prompt": f"What is  {i}+1? ", "chosen": "a", "rejected": "b"} for i in range(400)]
    chats = [[{"role": "system", "content": "Hi."}, {"role": "user", "content": f"What is {i}+1?"}] for i in range(400)]
    steps = [{"prompt": chat, "steps": ["a"], "labels": [1]} for chat in chats]
    section = dataclasses.replace(
        section,
        preferences=Judged(write_jsonl(tmp_path / "pairs.jsonl", pairs)),
        steps=Judged(write_jsonl(tmp_path / "steps.jsonl", steps)),
    )
    sources = Sources(Jsonl(write_jsonl(tmp_path / "p.jsonl", problems)), section, tmp_path / "data")
    held = {prompt_key(sources.task.prompt(record)) for record in sources.held_out}
    assert len(held) > 60
    for kind in ("problems", "preferences", "unpaired", "steps"):
        if kind == "unpaired":
            continue
        trained = {prompt_key(sources.task.prompt({"prompt": r["prompt"]})) for r in sources.prepared(kind).train}
        assert len(trained) > 250 and not trained & held, kind


def test_earlier_turns_that_answer_a_held_out_problem_are_left_out_counted_and_limited(
    section: Data, tmp_path: Path
) -> None:
    def chat(*questions: str) -> dict[str, Any]:
        roles = [("user", "assistant")] * len(questions)
        turns = [t for (u, a), q in zip(roles, questions, strict=True) for t in ((u, q), (a, "#### 1"))]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    singles = [chat(f"question {i}") for i in range(200)]
    held = next(f"question {i}" for i in range(200) if Split(5).holds_out(f"question {i}"))
    follow = next(f"more {i}" for i in range(99) if not Split(5).holds_out(f"{held}\n#### 1\nmore {i}"))
    path = write_jsonl(tmp_path / "p.jsonl", [*singles, chat(held, follow)])
    sources = Sources(Jsonl(path), section, tmp_path / "data")
    assert sources.notes(("problems",))[0] == (
        "problems: 1 training records left out because they answer a held-out problem"
    )
    assert not any(held == turn["content"] for record in sources.problems.train for turn in record["messages"])
    strict = dataclasses.replace(section, max_dropped=0.001)
    with pytest.raises(DataError, match="data.problems: 1 of .* answer a held-out problem, more than data.max_dropped"):
        _ = Sources(Jsonl(path), strict, tmp_path / "data").problems


class Leaky:
    """A user's task that splits by itself, wrongly."""

    def prepare(self, data_dir: Path, split: Split) -> Prepared:
        del data_dir, split
        rows = [{"q": f"{i}"} for i in range(20)]
        return Prepared(rows, rows[:10], "leaky")

    def prompt(self, record: Mapping[str, Any]) -> tuple[Message, ...]:
        return (Message("user", record["q"]),)

    def answer(self, record: Mapping[str, Any]) -> str:
        return str(record["q"])

    def extract(self, completion: str) -> str | None:
        return completion

    def correct(self, completion: str, record: Mapping[str, Any]) -> float | None:
        return float(completion == record["q"])


def test_a_task_of_a_user_may_not_train_on_its_held_out_problems(section: Data, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.problems: 10 of 20 training records answer a held-out problem"):
        _ = Sources(Leaky(), section, tmp_path / "data").problems


def test_judged_data_come_from_the_task_where_it_can_make_them(section: Data, tmp_path: Path) -> None:
    section = dataclasses.replace(section, preferences=Judged(train=20, validation=4), steps=Judged("", 20, 4))
    sources = Sources(TASK, section, tmp_path / "data")
    assert len(sources.prepared("preferences").train) == 20 and len(sources.prepared("steps").validation) == 8
    assert sources.prepared("unpaired") is sources.prepared("preferences")
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"{i}", "completion": "#### 1"} for i in range(40)])
    with pytest.raises(DataError, match=r"data\.steps\.path: got '', expected a JSONL file of prompt, steps, labels"):
        _ = Sources(Jsonl(path), section, tmp_path / "data").prepared("steps")


def test_what_was_chosen_for_the_answers_is_said(section: Data, tmp_path: Path) -> None:
    records = [{"prompt": f"{i}", "completion": f"#### {i}"} for i in range(40)]
    sources = Sources(Jsonl(write_jsonl(tmp_path / "p.jsonl", records)), section, tmp_path / "data")
    (said,) = sources.notes(("problems",))
    assert said.startswith("problems: answer_format=mark: of ") and sources.notes(("text",)) == []


def test_the_tokenizer_is_trained_once_and_again_for_another_corpus(section: Data, tmp_path: Path) -> None:
    first = Sources(TASK, section, tmp_path / "data").tokenizer
    (model,) = (tmp_path / "data" / "tokenizers").iterdir()
    written = model.stat().st_mtime_ns
    assert Sources(TASK, section, tmp_path / "data").tokenizer.model == first.model
    assert model.stat().st_mtime_ns == written
    text = Path(section.text.path)
    text.write_text(text.read_text(encoding="utf-8").replace("doc", "döc"), encoding="utf-8")
    other = Sources(TASK, section, tmp_path / "data").tokenizer
    assert other.model != first.model and len(list((tmp_path / "data" / "tokenizers").iterdir())) == 2


@pytest.mark.parametrize("model_type", ["bpe", "char"])
def test_only_a_vocabulary_of_characters_lacks_bytes(section: Data, tmp_path: Path, model_type: str) -> None:
    size = 0 if model_type == "char" else 370
    asked = dataclasses.replace(section, tokenizer=TokenizerSection(model_type=model_type, vocab_size=size))
    found = Sources(TASK, asked, tmp_path / "data").tokenizer
    assert ("<0x00>" in found.pieces) is (model_type == "bpe")


def test_a_kept_tokenizer_with_a_flipped_bit_is_refused(section: Data, tmp_path: Path) -> None:
    _ = Sources(TASK, section, tmp_path / "data").tokenizer
    (path,) = (tmp_path / "data" / "tokenizers").iterdir()
    content = bytearray(path.read_bytes())
    content[content.index(b"Q")] ^= 1  # "P": a model that loads
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"\.model: is damaged, its hash is not"):
        _ = Sources(TASK, section, tmp_path / "data").tokenizer


def test_given_tokenizers_are_loaded(section: Data, tmp_path: Path) -> None:
    trained = Sources(TASK, section, tmp_path / "data").tokenizer
    trained.save(tmp_path / "mine.model")
    given = dataclasses.replace(section, tokenizer=TokenizerSection(str(tmp_path / "mine.model")))
    assert Sources(TASK, given, tmp_path / "elsewhere").tokenizer.model == trained.model
    assert not (tmp_path / "elsewhere").exists()


def test_versions_change_with_content(section: Data, tmp_path: Path) -> None:
    before = Sources(TASK, section, tmp_path / "data").versions(("text", "problems"))
    assert before == Sources(TASK, section, tmp_path / "data").versions(("text", "problems"))
    after = Sources(dataclasses.replace(TASK, seed=1), section, tmp_path / "data").versions(("text", "problems"))
    assert after["text"] == before["text"] and after["problems"] != before["problems"]
    assert after["tokenizer"] == before["tokenizer"]  # characters come from the text alone


@pytest.mark.parametrize("name", ["arithmetic", "jsonl", "gsm8k"])
def test_tasks_are_found_by_name_with_their_options(name: str) -> None:
    component = find("task", name, "data.problems.task")
    options = {key: declared.default for key, declared in component.options.items()}
    assert component.make(options) == component.target() and options
    assert find("transform", "terse", "sft.data.transform").make({"fraction": 0.25}).fraction == 0.25
