"""The command that writes a report again."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from research.analysis.results import save_results
from tests.launch.forks import Forks
from tests.research.analysis.made_up import results


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as server:
        yield server


def test_help_begins_with_what_it_does_and_two_examples(forks: Forks) -> None:
    outcome = forks.run("report", "--help")
    assert outcome.stdout.lstrip().startswith("Writes an ablation's report again from its results on disk"), outcome
    assert outcome.stdout.count("  python -m launch.report --workdir=") == 2
    assert "Traceback" not in outcome.stderr


def test_a_report_by_another_metric_with_figures_and_a_table(forks: Forks, tmp_path: Path) -> None:
    save_results(tmp_path / "results.json", results())
    arguments = ("--metric=eval/loss", "--control=dpo", "--pairs=grpo:sft", "--format=latex,svg")
    outcome = forks.run("report", f"--workdir={tmp_path}", *arguments)
    assert outcome.status == 0, outcome
    assert "Lower is better." in outcome.stdout and "dpo (control)" in outcome.stdout
    assert f"report: {tmp_path / 'report' / 'report.html'}" in outcome.stdout
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names >= {"report.html", "report.md", "table.tex", "summary.png", "summary.svg", "curves.svg"}
    assert "grpo minus sft" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "results.json: cannot be read"), (("--format=eps",), "--format: got eps, expected some of latex,pdf,svg")],
)
def test_a_mistake_is_one_sentence(forks: Forks, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    outcome = forks.run("report", f"--workdir={tmp_path}", *arguments)
    assert outcome.status == 1 and outcome.stderr.startswith("error: ") and message in outcome.stderr, outcome
    assert not list(tmp_path.iterdir())
