"""Options of tools, until each is a component of its own."""

import dataclasses

from research.config.schema import key


@dataclasses.dataclass(frozen=True)
class Calculator:
    """Exact arithmetic."""


@dataclasses.dataclass(frozen=True)
class Search:
    """BM25 over a corpus."""

    corpus: str = key("", "The file that it reads: .jsonl records with text, or text.")
    results: int = key(3, "Documents of one answer.", low=1)


@dataclasses.dataclass(frozen=True)
class Python:
    """Programs in the sandbox."""

    isolation: str = key("required", "Of its programs.", choices=("required", "best_effort"))


PROVIDES = {"tool": {"calculator": Calculator, "search": Search, "python": Python}}
