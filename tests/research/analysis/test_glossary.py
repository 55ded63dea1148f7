"""The glossary: what is logged is explained, and the document says what the table says."""

from pathlib import Path

import pytest

import research.analysis.glossary
from research.analysis.glossary import GROUPS, describe, to_markdown


def test_the_document_is_up_to_date():
    place = Path(research.analysis.glossary.__file__).with_name("METRICS.md")
    assert place.read_text("utf-8") == to_markdown(), (
        "python -m research.analysis.glossary > research/analysis/METRICS.md"
    )


def test_each_entry_is_once_and_has_unit_and_meaning():
    entries = [entry for entries in GROUPS.values() for entry in entries]
    names = [name for name, _, _ in entries]
    assert len(set(names)) == len(names)
    assert all(unit and meaning for _, unit, meaning in entries)


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
