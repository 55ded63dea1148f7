"""The generated task as prepared data: determinism by content, splits without a shared prompt, judged solutions."""

from functools import partial

import pytest

from research.core.errors import DataError
from research.data.preferences import parse_preference, parse_ranking
from research.data.split import Split
from research.data.steps import parse_steps
from research.data.store import Prepared
from research.tasks.arithmetic.task import Arithmetic
from research.tasks.arithmetic.terse import Terse
from research.tasks.base import Generates, worked_text

SPLIT = Split(10)
SMALL = {"train": 40, "test": 6}


def make(kind, tmp_path, *, sizes=(40, 6), split=SPLIT, **options) -> Prepared:
    task = Arithmetic(**{**SMALL, **options})
    assert isinstance(task, Generates)
    if kind == "problems":
        return task.prepare(tmp_path, split)
    build = partial(task.rankings, candidates=3) if kind == "rankings" else getattr(task, kind)
    return build(tmp_path, split, train=sizes[0], validation=sizes[1])


KINDS = ["problems", "preferences", "steps", "rankings"]


@pytest.mark.parametrize("kind", KINDS)
def test_generated_sets_are_a_function_of_their_parameters(tmp_path, monkeypatch, kind):
    first = make(kind, tmp_path / "a")
    again = make(kind, tmp_path / "b")
    assert first.version == again.version and first.details == again.details
    assert list(first.train) == list(again.train) and list(first.validation) == list(again.validation)
    changed = [{"seed": 1}, {"max_value": 50}, {"split": Split(9)}]
    versions = {make(kind, tmp_path / "a", **options).version for options in changed}
    assert len(versions | {first.version}) == 4
    if kind != "problems":
        monkeypatch.setattr("research.tasks.arithmetic.task.CORRUPTION", 2)
        assert make(kind, tmp_path / "a").version != first.version


@pytest.mark.parametrize("kind", KINDS)
def test_generated_splits_share_no_prompt_whatever_the_seed(tmp_path, kind):
    sets = [make(kind, tmp_path, seed=seed) for seed in (0, 1)]
    train = {record["prompt"] for data in sets for record in data.train}
    held = {record["prompt"] for data in sets for record in data.validation}
    assert not train & held and len(train) > 60
    assert all(map(SPLIT.holds_out, held)) and not any(map(SPLIT.holds_out, train))


def test_problems_carry_their_steps_and_are_judged_by_their_answer(tmp_path):
    task, data = Arithmetic(**SMALL), make("problems", tmp_path)
    assert (len(data.train), len(data.validation)) == (40, 6)
    record = data.train[3]
    assert set(record) == {"prompt", "completion", "answer", "steps", "difficulty", "kind"}
    assert record["completion"] == "\n".join([*record["steps"], f"#### {record['answer']}"])
    assert record["difficulty"] == len(record["steps"])
    assert [message.content for message in task.prompt(record)] == [record["prompt"]]
    assert task.correct(record["completion"], record) == 1.0
    assert task.correct(f"#### {int(record['answer']) + 1}", record) == 0.0
    assert task.extract(record["completion"]) == task.answer(record) == record["answer"]
    assert worked_text(record) == {"text": f"{record['prompt']}\n{record['completion']}"}


def test_generated_pairs_are_the_corruption_of_their_prompt(tmp_path):
    data = make("preferences", tmp_path, seed=3)
    assert data.details["records"] == {"train": 40, "validation": 6}
    for record in data.train:
        pair = parse_preference(record, where="r")
        right = f"#### {eval(pair.prompt[0].content)}"
        assert pair.chosen.content.endswith(right) and not pair.rejected.content.endswith(right)
        assert (pair.margin, pair.label_probability) == (0.0, 1.0)


def test_generated_steps_come_right_and_wrong(tmp_path):
    data = make("steps", tmp_path)
    assert data.details["records"] == {"train": 80, "validation": 12}
    solutions = [parse_steps(record, where="r") for record in data.train]
    for right, wrong in zip(solutions[::2], solutions[1::2], strict=True):
        assert right.prompt == wrong.prompt and set(right.labels) == {1.0}
        first = wrong.labels.index(0.0)
        assert wrong.labels == (1.0,) * first + (0.0,) * (len(wrong.labels) - first)
        assert right.steps[:first] == wrong.steps[:first] and right.steps[first] != wrong.steps[first]


def test_generated_rankings_put_the_right_answer_first(tmp_path):
    for record in make("rankings", tmp_path).train:
        ranking = parse_ranking(record, where="r")
        rights = [c.content.endswith(f"#### {eval(record['prompt'])}") for c in ranking.completions]
        assert rights == [rank == 0 for rank in ranking.ranks] and sum(rights) == 1
        assert len(rights) == 3


RECORDS = [{"prompt": f"{i}+1", "completion": f"{i}+1={i + 1}\n#### {i + 1}", "answer": str(i + 1)} for i in range(200)]


def test_terse_takes_the_steps_from_its_share_and_decides_by_content():
    found = [Terse(0.5)(record)["completion"] for record in RECORDS]
    short = [text for text, record in zip(found, RECORDS, strict=True) if text != record["completion"]]
    assert 70 < len(short) < 130 and all(text.startswith("#### ") for text in short)
    assert found == [Terse(0.5)(record)["completion"] for record in RECORDS]
    assert all(Terse(0.0)(record) == record for record in RECORDS)
    assert all("\n" not in Terse(1.0)(record)["completion"] for record in RECORDS)
    wider = [Terse(0.8)(record)["completion"] for record in RECORDS]  # a larger share contains the smaller
    assert all("\n" not in w for f, w in zip(found, wider, strict=True) if "\n" not in f)


def test_a_terse_solution_keeps_its_last_step_and_label():
    records = [
        {"prompt": f"{i}+1", "steps": [f"{i}+1={i + 1}", f"#### {i + 1}"], "labels": [1.0, float(i % 2)]}
        for i in range(400)
    ]
    changed = [Terse(0.5)(record) for record in records]
    short = [(a, b) for a, b in zip(records, changed, strict=True) if a != b]
    assert 140 < len(short) < 260 and Terse(0.0)(records[0]) == records[0]
    for before, after in short:
        assert after["steps"] == before["steps"][-1:] and after["labels"] == before["labels"][-1:]


def test_terse_draws_each_side_of_a_pair_for_itself():
    pairs = [{"prompt": f"{i}", "chosen": f"a\n#### {i}", "rejected": "b\n#### wrong"} for i in range(400)]
    changed = [Terse(0.5)(pair) for pair in pairs]
    bare = [[pair[key].startswith("####") for key in ("chosen", "rejected")] for pair in changed]
    assert all(60 < bare.count([a, b]) < 140 for a in (True, False) for b in (True, False))
    assert Terse(0.0)(pairs[0]) == pairs[0]
    same = {"prompt": "1", "chosen": "a\n#### 1", "rejected": "b\n#### 1"}
    assert Terse(1.0)(same) == same
    with pytest.raises(DataError, match="transform terse: found the keys messages, expected a generated record"):
        Terse(1.0)({"messages": []})
