"""Results survive the way through JSON; damaged files are named."""

import dataclasses
import json
import math

import pytest

from research.analysis.results import StageUse, load_results, save_results
from research.core.errors import DataError, WorkdirError
from tests.research.analysis.made_up import failed, results


def test_round_trip(tmp_path):
    runs = results()
    runs[0] = dataclasses.replace(failed(runs[0]), metrics={"eval/loss": math.inf})
    runs[1] = dataclasses.replace(
        runs[1],
        error="\ud800\0",
        grid={"a.b": 0.1, "c": "x"},
        stages=(StageUse("sft", "stages/sft-0", 1.5, True),),
        evaluation="e",
        curve_evaluation="f",
    )
    save_results(tmp_path / "results.json", runs)
    assert load_results(tmp_path / "results.json") == runs
    json.loads((tmp_path / "results.json").read_text(), parse_constant=lambda text: pytest.fail(text))


def test_results_of_an_older_version_are_read(tmp_path):
    save_results(tmp_path / "results.json", results()[:2])
    records = json.loads((tmp_path / "results.json").read_text())
    for record in records:
        for key in ("grid", "stages", "evaluation", "curve_evaluation"):
            del record[key]
    (tmp_path / "results.json").write_text(json.dumps(records))
    assert load_results(tmp_path / "results.json") == results()[:2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("seed"), "result 1: the keys .'seed'. are missing"),
        (lambda record: record.update(color=1), "result 1: got unknown keys .'color'."),
        (lambda record: record["budget"].pop("flops"), "result 1, budget: the keys .'flops'. are missing"),
        (lambda record: record.update(status="lost"), "got status 'lost'"),
    ],
)
def test_damaged_record_is_named(tmp_path, change, message):
    path = tmp_path / "results.json"
    save_results(path, results()[:2])
    records = json.loads(path.read_text())
    change(records[1])
    path.write_text(json.dumps(records))
    with pytest.raises(DataError, match=message):
        load_results(path)


def test_unreadable_files(tmp_path):
    with pytest.raises(WorkdirError, match="cannot be read"):
        load_results(tmp_path / "absent.json")
    (tmp_path / "half.json").write_text('[{"arm":')
    with pytest.raises(WorkdirError, match="half.json: is not the JSON file"):
        load_results(tmp_path / "half.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match="expected a list"):
        load_results(tmp_path / "other.json")
