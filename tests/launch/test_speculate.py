"""`python -m launch.speculate` from two trained stages to table and JSON; its mistakes in one sentence."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.forks import Forks
from tests.launch.test_launch import assert_one_sentence, stage_folder

TOY = """
from pathlib import Path
from experiments import speculative
from tests.experiments.toy import shrink

def get_config(arg=""):
    return shrink(speculative.get_config(arg), Path({folder!r}))
"""


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as server:
        yield server


@pytest.mark.slow
def test_from_training_to_a_table(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(TOY.format(folder=str(tmp_path)), encoding="utf-8")
    run, out = tmp_path / "run", tmp_path / "out"
    outcome = forks.run("train", f"--config={tmp_path / 'toy.py'}", f"--workdir={run}")
    assert outcome.status == 0, outcome.stderr
    target, draft = stage_folder(run, "target"), stage_folder(run, "draft")
    flags = (f"--stage={target}", f"--draft={draft},ngram", "--draft_tokens=1,2")
    sizes = ("--repetitions=2", "--prompt_length=32", "--max_new_tokens=6")
    outcome = forks.run("speculate", *flags, *sizes, f"--output={out}")
    assert outcome.status == 0, outcome.stderr
    assert "draft 1" in outcome.stdout and "ngram" in outcome.stdout
    record = json.loads((out / "speculative.json").read_text())
    trials = [(t["temperature"], t["proposals"]) for t in record["trials"]]
    names = ("plain", "draft 1, 1", "draft 1, 2", "ngram, 1", "ngram, 2")
    assert trials == [(temperature, name) for temperature in (0.0, 1.0) for name in names]
    assert all(t["tokens"] == [6, 6] for t in record["trials"])
    assert record["trials"][0]["speed_up"] == [1.0, 1.0]
    assert (out / "speculative.md").read_text(encoding="utf-8").count("\n") == 2 + len(trials)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--draft_tokens=0", "--draft_tokens: got 0, expected integers from 1 to 64"),
        ("--draft_tokens=10000", "--draft_tokens: got 10000, expected integers from 1 to 64"),
        ("--draft_tokens=nan", "--draft_tokens: got nan, expected integers from 1 to 64"),
        ("--temperature=0,inf", r"temperature: got inf, expected 0 \(greedy\) or a number from 0.001 to 100"),
        ("--draft_tokens=two", "--draft_tokens: got two, expected numbers"),
        ("--temperature=-1", r"temperature: got -1, expected 0 \(greedy\) or a number from 0.001 to 100"),
        ("--seed=0", "nothing: is not the folder of a stage that has run"),
    ],
)
def test_mistakes(forks: Forks, tmp_path: Path, flag: str, message: str) -> None:
    outcome = forks.run("speculate", f"--stage={tmp_path / 'nothing'}", "--draft=ngram", f"--output={tmp_path}", flag)
    assert_one_sentence(outcome, message)


def test_help_shows_an_example(forks: Forks) -> None:
    assert "  python -m launch.speculate --stage=" in forks.run("speculate", "--help").stdout
