"""What every logged metric means and its unit, as `METRICS.md` says, which is read here."""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from research.analysis.markdown import code, escape, table

_ROW = re.compile(r"^\| `(?P<name>[^`]+)` \| (?P<unit>[^|]+) \| (?P<meaning>.+) \|$", re.MULTILINE)


class Metric(NamedTuple):
    """An entry of the glossary; `<x>` in its name stands for anything."""

    name: str
    unit: str
    meaning: str


@cache
def entries() -> tuple[Metric, ...]:
    """The rows of the tables in `METRICS.md`."""
    text = Path(__file__).with_name("METRICS.md").read_text(encoding="utf-8")
    rows = [Metric(*(re.sub(r"\\(.)", r"\1", cell) for cell in match.groups())) for match in _ROW.finditer(text)]
    return tuple(sorted(rows, key=lambda metric: metric.name.count("<")))  # an exact name before a pattern


def describe(name: str) -> Metric | None:
    """The entry that explains a metric, under the metric's own name; None if there is none."""
    for entry in entries():
        if re.fullmatch(re.sub(r"<\w+>", "[^/]+", re.escape(entry.name)), name):
            return entry._replace(name=name)
    found = describe(name.removeprefix("eval/")) if name.startswith("eval/") else None
    return None if found is None else Metric(name, found.unit, f"on held-out data: {found.meaning}")


def glossary_table(names: Iterable[str]) -> str:
    """A Markdown table of these metrics."""
    found = [describe(name) or Metric(name, "?", "not in the glossary: a component's own") for name in names]
    rows = [[code(metric.name), escape(metric.unit), escape(metric.meaning)] for metric in found]
    return table(["metric", "unit", "meaning"], rows)
