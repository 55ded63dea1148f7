"""Problems from files: answers of every type, how they are matched, and files in which nothing could be right."""

import json
from pathlib import Path
from typing import Any

import pytest

from research.core.errors import DataError
from research.data.split import Split
from research.tasks.gsm8k import Gsm8k
from research.tasks.jsonl import Jsonl, answer_text, answers_of

CAPITALS = ["Paris", "Rome", "Quito", "Oslo", "Lima", "Bern", "Cairo", "Delhi", "Accra", "Tunis"]


def fitted(tmp_path: Path, records: list[dict[str, Any]], **options: Any) -> tuple[Jsonl, str]:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    task = Jsonl(str(path), **options)
    return task.fit(task.prepare(tmp_path / "data", Split(3)))


def perfect(tmp_path: Path, records: list[dict[str, Any]]) -> float:
    """The accuracy of a model that gives the reference response of each record."""
    task, _ = fitted(tmp_path, records)
    scores = [task.correct(record["completion"], record) for record in records]
    return sum(score or 0 for score in scores) / len(scores)


@pytest.mark.parametrize(
    ("chosen", "completion", "answer"),
    [
        ("mark", "It is {n}.\n#### {n}", None),
        ("mark", "Thus $\\boxed{{{n}}}$.", str),
        ("plain", "{city}", None),
        ("plain", "Let me see.\n{n}", int),
        ("normalized", "The answer is {n}.0 apples.", float),
    ],
)
def test_a_perfect_model_is_right_whatever_the_answers_look_like(tmp_path, chosen, completion, answer):
    records = [
        {"prompt": f"p{n}", "completion": completion.format(n=n, city=city), "answer": answer and answer(n)}
        for n, city in enumerate(CAPITALS)
    ]
    task, said = fitted(tmp_path, records)
    assert task.answer_format == chosen and said.startswith(f"answer_format={chosen}: of ")
    assert perfect(tmp_path, records) == 1.0
    assert task.correct("nonsense\n#### -3", records[0]) == 0.0


def test_the_strictest_format_that_nearly_all_responses_have_is_chosen(tmp_path):
    records = [{"prompt": f"p{n}", "completion": f"#### {n}", "answer": n} for n in range(150)]
    odd = next(n for n in range(150) if not Split(3).holds_out(f"p{n}"))
    records[odd]["completion"] = f"It is {odd}."
    task, said = fitted(tmp_path, records)
    assert task.answer_format == "mark" and "mark 106, plain 0, normalized 107 would" in said


def test_answers_without_responses_are_matched_by_their_look(tmp_path):
    task, said = fitted(tmp_path, [{"prompt": f"p{n}", "answer": city} for n, city in enumerate(CAPITALS)])
    assert task.answer_format == "normalized" and "there are no responses" in said
    assert task.correct("I think so.\nParis", {"prompt": "p", "answer": "paris"}) == 1.0
    marks = [{"question": f"p{n}", "answer": f"so\n#### {n}"} for n in range(9)]
    assert fitted(tmp_path, marks)[0].answer_format == "mark"
    half = [*marks, *({"question": f"c{n}", "answer": city} for n, city in enumerate(CAPITALS))]
    assert fitted(tmp_path, half)[0].answer_format == "normalized", "few are marked"


def test_long_texts_are_not_judged_and_it_is_said(tmp_path):
    records = [{"prompt": f"p{n}", "completion": f"{city} is a city. " * 9} for n, city in enumerate(CAPITALS)]
    task, said = fitted(tmp_path, records)
    assert task.answer_format == "none" and "are long texts (median 1" in said
    assert task.correct(records[0]["completion"], records[0]) is None and task.extract("#### 3") is None
    worked = [{"prompt": f"p{n}", "completion": "Long ago. " * n, "answer": city} for n, city in enumerate(CAPITALS, 5)]
    task, said = fitted(tmp_path, worked)
    assert task.answer_format == "none" and "at most 0 state their answer" in said


def test_a_format_under_which_nothing_is_right_is_refused_before_training(tmp_path):
    records = [{"prompt": f"p{n}", "completion": city} for n, city in enumerate(CAPITALS)]
    with pytest.raises(DataError, match=r"answer_format=mark finds no answer.*mark 0, plain \d, normalized \d"):
        fitted(tmp_path, records, answer_format="mark")


def test_any_answer_of_a_list_is_right_and_numbers_are_spelled_out():
    record = {"prompt": "p", "answer": ["NYC", "New York", 1e-05]}
    task = Jsonl(answer_format="normalized")
    assert answers_of(record) == ("NYC", "New York", "0.00001") and task.answer(record) == "NYC"
    assert [task.correct(text, record) for text in ("new york", "nyc", "0.00001", "1e-5", "Rome")] == [1, 1, 1, 1, 0]
    assert (answer_text(2.50), answer_text(1e22), answer_text(7), answer_text(float("nan"))) == (
        "2.5", "10000000000000000000000", "7", "",
    )  # fmt: skip
    assert task.correct("x", {"messages": [{"role": "user", "content": "q"}], "answer": None}) is None


def test_before_the_data_have_been_seen_answers_are_matched_normalized():
    task = Jsonl()
    assert task.extract("So it is\nThe Answer.") == Jsonl(answer_format="normalized").extract("the answer") is not None
    assert task.correct("PARIS.", {"prompt": "p", "answer": "paris"}) == 1.0
    assert (
        Jsonl(answer_format="mark").extract("no mark") is None and Jsonl(answer_format="none").extract("#### 3") is None
    )


@pytest.mark.parametrize("answer", ["", " \n", [], ["a", ""], {"a": 1}, [None], float("nan")])
def test_answers_that_could_never_match_are_refused_by_line(tmp_path, answer):
    records = [*({"prompt": f"p{n}", "answer": "x"} for n in range(9)), {"prompt": "last", "answer": answer}]
    with pytest.raises(DataError, match=r"in\.jsonl:10: answer: got .*, expected text, a number, or a list"):
        fitted(tmp_path, records)


def test_gsm8k_keeps_its_form(tmp_path):
    path = tmp_path / "gsm.jsonl"
    records = [{"question": f"q{n}", "answer": f"1+{n}=<<1+{n}={1 + n}>>{1 + n}\n#### {1 + n}"} for n in range(9)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = Gsm8k(str(path)).prepare(tmp_path / "data", Split(3))
    task, _ = Gsm8k(str(path)).fit(data)
    assert isinstance(task, Gsm8k) and task.correct("thus\n#### 3", {"question": "q", **records[2]}) == 1.0
    path.write_text(path.read_text() + '{"question": "q", "answer": "42"}\n')
    with pytest.raises(DataError, match=r"gsm\.jsonl:10: answer: its last line does not begin with '####'"):
        Gsm8k(str(path)).prepare(tmp_path / "data", Split(3))
    with pytest.raises(DataError, match="data.problems.jsonl.path: got '', expected a JSONL file"):
        Jsonl().prepare(tmp_path / "data", Split(3))
