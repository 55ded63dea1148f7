"""Prepared feedback: round trips, determinism by content, splits without a shared prompt, refused files."""

import json

import pytest

from research.core.errors import DataError
from research.data.builders import (
    FileSpec,
    base,
    prepare_arithmetic_preferences,
    prepare_arithmetic_rankings,
    prepare_arithmetic_steps,
    prepare_judged,
    prepare_preferences,
    prepare_rankings,
    prepare_steps,
)
from research.data.jsonl import read_records
from research.data.preferences import parse_judged, parse_preference, parse_ranking
from research.data.steps import parse_steps
from research.tasks.arithmetic.corruption import content_rng, corrupt
from research.tasks.arithmetic.problems import ArithmeticSpec, is_held_out

SIZES = {"n_train": 40, "n_validation": 6, "seed": 0}
GENERATED = {
    "preferences": prepare_arithmetic_preferences,
    "steps": prepare_arithmetic_steps,
    "rankings": lambda *args, **kwargs: prepare_arithmetic_rankings(*args, candidates=3, **kwargs),
}


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def prompt_of(record):
    (message,) = record["prompt"]
    return message["content"]


@pytest.mark.parametrize("kind", list(GENERATED))
def test_generated_sets_are_a_function_of_their_parameters(tmp_path, monkeypatch, kind):
    first = GENERATED[kind](tmp_path / "a", **SIZES)
    again = GENERATED[kind](tmp_path / "b", **SIZES)
    assert first.version == again.version and first.details == again.details
    for split in ("train", "validation"):
        assert list(first.splits[split]) == list(again.splits[split])
    changed = [
        {**SIZES, "seed": 1},
        {**SIZES, "spec": ArithmeticSpec(max_value=50)},
        {**SIZES, "n_train": 41},
    ]
    versions = {GENERATED[kind](tmp_path / "a", **options).version for options in changed}
    assert len(versions | {first.version}) == 4
    monkeypatch.setattr(base, "_write", lambda _: pytest.fail("written twice"))
    assert GENERATED[kind](tmp_path / "a", **SIZES).version == first.version
    monkeypatch.undo()
    monkeypatch.setattr("research.tasks.arithmetic.build.CORRUPTION", 2)
    assert GENERATED[kind](tmp_path / "a", **SIZES).version != first.version


@pytest.mark.parametrize("kind", list(GENERATED))
def test_generated_splits_share_no_prompt_whatever_the_seed(tmp_path, kind):
    sets = [GENERATED[kind](tmp_path, **{**SIZES, "seed": seed}) for seed in (0, 1)]
    train = {prompt_of(record) for data in sets for record in data.train}
    held = {prompt_of(record) for data in sets for record in data.validation}
    assert not train & held and len(train) > 60
    assert all(map(is_held_out, held)) and not any(map(is_held_out, train))


def test_generated_pairs_are_the_corruption_of_their_prompt(tmp_path):
    data = prepare_arithmetic_preferences(tmp_path, n_train=40, n_validation=6, seed=3)
    assert data.details["records"] == {"train": 40, "validation": 6}
    for record in data.train:
        pair = parse_preference(record, where="r")
        prompt = pair.prompt[0].content
        wrong = corrupt(prompt, content_rng(prompt, 3), max_value=99)
        assert pair.rejected.content == wrong.solution
        assert pair.chosen.content.endswith(f"#### {eval(prompt)}")
        assert (pair.margin, pair.label_probability) == (0.0, 1.0)


def test_generated_steps_come_right_and_wrong(tmp_path):
    data = prepare_arithmetic_steps(tmp_path, **SIZES)
    assert data.details["records"] == {"train": 80, "validation": 12}
    solutions = [parse_steps(record, where="r") for record in data.train]
    for right, wrong in zip(solutions[::2], solutions[1::2], strict=True):
        assert right.prompt == wrong.prompt and set(right.labels) == {1.0}
        first = wrong.labels.index(0.0)
        assert wrong.labels == (1.0,) * first + (0.0,) * (len(wrong.labels) - first)
        assert right.steps[:first] == wrong.steps[:first] and right.steps[first] != wrong.steps[first]
        assert right.steps[-1] == f"#### {eval(right.prompt[0].content)}" != wrong.steps[-1]


def test_generated_rankings_put_the_right_answer_first(tmp_path):
    data = prepare_arithmetic_rankings(tmp_path, candidates=4, **SIZES)
    for record in data.train:
        ranking = parse_ranking(record, where="r")
        rights = [c.content.endswith(f"#### {eval(prompt_of(record))}") for c in ranking.completions]
        assert rights == [rank == 0 for rank in ranking.ranks] and sum(rights) == 1
        assert len(rights) == 4


def test_files_round_trip(tmp_path):
    pairs = [
        {"prompt": f"p{n}", "chosen": "a", "rejected": "b", "margin": n / 4, "label_probability": 0.75}
        for n in range(8)
    ]
    steps = [{"prompt": f"p{n}", "steps": ["a", "é b"], "labels": [None, n / 8]} for n in range(8)]
    rankings = [{"prompt": f"p{n}", "completions": ["a", "b", "c"], "ranks": [n, -1, n]} for n in range(8)]
    judged = [{"prompt": f"p{n}", "completion": "a", "label": n % 2 == 0} for n in range(8)]
    cases = (
        (prepare_preferences, FileSpec, parse_preference, pairs),
        (prepare_steps, FileSpec, parse_steps, steps),
        (prepare_rankings, FileSpec, parse_ranking, rankings),
        (prepare_judged, FileSpec, parse_judged, judged),
    )
    for prepare, spec, parse, records in cases:
        path = write_jsonl(tmp_path / "in.jsonl", records)
        data = prepare(tmp_path / "out", spec(path, validation_one_in=0))
        found = [parse(record, where="r") for record in data.train]
        assert found == [parse(record, where="r") for record in records]
    path = write_jsonl(tmp_path / "in.jsonl", pairs)
    both = prepare_judged(tmp_path / "out", FileSpec(path, validation_one_in=0))
    assert [record["label"] for record in both.train] == [True, False] * 8


def test_one_prompt_is_never_on_both_sides_of_a_file(tmp_path):
    steps = [{"prompt": f"p{n % 20}", "steps": [f"{n}"], "labels": [1]} for n in range(100)]
    judged = [{"prompt": f"p{n % 20}", "completion": f"{n}", "label": True} for n in range(100)]
    rankings = [{"prompt": f"p{n % 20}", "completions": [f"{n}", "x"], "ranks": [0, 1]} for n in range(100)]
    for prepare, spec, records in (
        (prepare_steps, FileSpec, steps),
        (prepare_judged, FileSpec, judged),
        (prepare_rankings, FileSpec, rankings),
    ):
        path = write_jsonl(tmp_path / "in.jsonl", records)
        data = prepare(tmp_path / "out", spec(path, validation_one_in=4))
        sides = [{prompt_of(record) for record in part} for part in (data.train, data.validation)]
        assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 20


def test_bad_files_name_the_line_and_leave_nothing(tmp_path):
    cases = (
        (
            prepare_steps,
            FileSpec,
            {"prompt": "p", "steps": ["a"], "labels": []},
            "found 0 labels for 1 steps",
        ),
        (prepare_steps, FileSpec, {"input": "p", "steps": ["a"], "mistake_index": 1}, "mistake_index: got 1"),
        (prepare_rankings, FileSpec, {"prompt": "p", "completions": ["a", "b"], "ranks": [0]}, "1 ranks"),
        (
            prepare_judged,
            FileSpec,
            {"prompt": "p", "completion": "a", "label": None},
            "label: got None",
        ),
        (
            prepare_preferences,
            FileSpec,
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": []},
            r"margin: got \[\]",
        ),
    )
    for prepare, spec, record, message in cases:
        path = write_jsonl(tmp_path / "in.jsonl", [record])
        with pytest.raises(DataError, match=rf"in\.jsonl:1: .*{message}"):
            prepare(tmp_path / "out", spec(path, validation_one_in=0))
        with pytest.raises(DataError, match="validation_one_in is 1, expected 0 or at least 2"):
            prepare(tmp_path / "out", spec(path, validation_one_in=1))
    assert not list((tmp_path / "out").glob("*/*/*"))


@pytest.mark.parametrize("name", ["bbm_multistep_arithmetic.jsonl", "bbm_logical_deduction.jsonl"])
def test_big_bench_mistake_is_prepared(tmp_path, shared_data, name):
    data = prepare_steps(tmp_path, FileSpec(str(shared_data / name)))
    assert data.details["records"]["train"] + data.details["records"]["validation"] == 300
    expected = {repr(parse_steps(record, where="r")) for _, record in read_records(shared_data / name)}
    found = {repr(parse_steps(record, where="r")) for part in data.splits.values() for record in part}
    assert found == expected and len(found) == 300
