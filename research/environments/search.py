"""Search in a local corpus by BM25."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from research.config.schema import expect, key
from research.core.errors import DataError
from research.data.jsonl import read_records, read_text
from research.data.store import file_hash
from research.environments.base import Tool, optional_package, text_tool


@dataclass(frozen=True)
class Document:
    """One entry of a corpus; `title` may be empty."""

    id: str
    text: str
    title: str = ""


def read_corpus(path: str | Path) -> tuple[Document, ...]:
    """The documents of a file, at least one, with different ids; DataError names what is wrong.

    A `.jsonl` (or `.json`) file has objects with `text` and, if wanted, `id` and `title`; an entry without an id
    is called by its number. Any other file is text, in which blank lines separate documents.
    """
    path = Path(path)
    if path.suffix in (".jsonl", ".json"):
        documents = tuple(_records(path))
    else:
        paragraphs = filter(None, (part.strip() for part in re.split(r"\n\s*\n", read_text(path))))
        documents = tuple(Document(str(number), paragraph) for number, paragraph in enumerate(paragraphs, start=1))
    if not documents:
        raise DataError(f"{path}: holds no documents, expected at least one.")
    [(name, count)] = Counter(document.id for document in documents).most_common(1)
    if count > 1:
        raise DataError(f"{path}: two documents have the id {name!r}, expected different ones.")
    return documents


def _records(path: Path) -> Iterator[Document]:
    for number, record in read_records(path):
        text, title, name = record.get("text"), record.get("title", ""), record.get("id", number)
        if not isinstance(text, str) or not text.strip() or not isinstance(title, str):
            found = ", ".join(record) or "(none)"
            raise DataError(f"{path}:{number}: found the keys {found}, expected a non-empty text (and title).")
        yield Document(str(name), text, title)


class Index:
    """BM25 (Lucene's variant, k1 = 1.5, b = 0.75) over documents; words are lower-cased, none is left out.

    Source: Robertson and Zaragoza 2009; computed by bm25s (Lu 2024, arXiv:2407.03618).
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        """Indexes titles and texts."""
        # Its import also imports jax, and runs one small operation on jax's default device.
        self._bm25s = optional_package("bm25s", "search")
        self.documents = tuple(documents)
        words = self._words([f"{each.title} {each.text}" for each in self.documents])
        if not any(words):
            raise DataError(f"search: the {len(self.documents)} documents have no words, expected some.")
        self._index = self._bm25s.BM25(method="lucene", k1=1.5, b=0.75, backend="numpy")
        self._index.index(words, show_progress=False)
        self._known = frozenset(word for each in words for word in each)

    def _words(self, texts: list[str]) -> list[list[str]]:
        found: list[list[str]] = self._bm25s.tokenize(
            texts, token_pattern=r"(?u)\b\w+\b", stopwords=[], return_ids=False, show_progress=False
        )
        return found

    def top(self, query: str, k: int) -> list[tuple[Document, float]]:
        """At most k documents that share a word with the query, best first; the earlier one where scores tie."""
        words = [word for word in self._words([query])[0] if word in self._known]
        if not words:
            return []
        scores = self._index.get_scores(words)
        # The library's own top-k leaves the order of ties open.
        order = np.argsort(-scores, kind="stable")[:k]
        return [(self.documents[i], float(scores[i])) for i in order if scores[i] > 0]


@dataclass(frozen=True)
class Search:
    """The tool "search"."""

    corpus: str = key("", "File that is searched: JSONL with `text` (`id`, `title`), or text with blank lines between "
                          "documents.")  # fmt: skip
    results: int = key(3, "Documents of one answer.", low=1)
    max_characters: int = key(500, "Of each document's text; the rest is cut.", unit="characters", low=1)

    def __call__(self) -> Tool:
        """Reads and indexes the corpus."""
        expect(self.corpus, "tools.search.corpus", self.corpus, "a JSONL or text file to search")
        index = Index(read_corpus(self.corpus))

        def answer(query: str) -> str:
            found = index.top(query, self.results)
            return "\n\n".join(self._shown(document) for document, _ in found) or "no document matches"

        description = f"Searches documents by words; gives the {self.results} that match best."
        version = {"corpus": file_hash(Path(self.corpus))}
        return text_tool("search", description, "query", "words to look for", answer, **version)

    def _shown(self, document: Document) -> str:
        most = self.max_characters
        text = document.text if len(document.text) <= most else f"{document.text[:most]}..."
        return f"{f'[{document.id}] {document.title}'.strip()}\n{text}"


PROVIDES = {"tool": {"search": Search}}
