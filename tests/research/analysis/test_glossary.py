"""The glossary: every row of its document is read, and what is logged is explained."""

from pathlib import Path

import pytest

import research.analysis.glossary
from research.analysis.glossary import describe, entries


def test_every_row_of_the_document_is_read_and_each_metric_is_there_once():
    text = Path(research.analysis.glossary.__file__).with_name("METRICS.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    names = [metric.name for metric in entries()]
    assert len(rows) == len(names) == len(set(names)) > 80
    assert all(line.count("|") - line.count("\\|") == 4 for line in rows)


@pytest.mark.parametrize(
    ("name", "unit", "part"),
    [
        ("kl/reference", "nats a completion", "k1"),
        ("kl_ref", "nats a token", "k3"),
        ("eval/pass@16", "fraction", "at least one of k"),
        ("reward/exact_answer/mean", "reward", "one reward function"),
        ("reward/mean", "reward", "learned from"),
        ("eval/nll", "nats a token", "on held-out data: negative"),
        ("tools/calculator/error_rate", "fraction", "one tool"),
    ],
)
def test_what_a_metric_is(name, unit, part):
    found = describe(name)
    assert found is not None and found.name == name and found.unit == unit and part in found.meaning


def test_an_unknown_metric_has_no_entry():
    assert describe("my/own/metric") is None and describe("eval/mine") is None
