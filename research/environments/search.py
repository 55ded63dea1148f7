"""Search in a local corpus by BM25."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from research.config.schema import key
from research.core.errors import ConfigError, DataError
from research.data.jsonl import read_records
from research.data.store import file_hash
from research.environments.base import Tool

_WORD = r"(?u)\b\w+\b"


@dataclass(frozen=True)
class Document:
    """One entry of a corpus; `title` may be empty."""

    id: str
    text: str
    title: str = ""


def read_corpus(path: str | Path) -> tuple[Document, ...]:
    """The documents of a file.

    A `.jsonl` (or `.json`) file has objects with `text` and, if wanted, `id` and `title`; an entry without an id
    is called by its number. Any other file is text, in which blank lines separate documents.

    Raises:
      DataError: the file is missing or empty, an entry has no text, or two have one id.
    """
    path = Path(path)
    documents = tuple(_records(path) if path.suffix in (".jsonl", ".json") else _paragraphs(path))
    if not documents:
        raise DataError(f"{path}: holds no documents, expected at least one.")
    seen: set[str] = set()
    for document in documents:
        if document.id in seen:
            raise DataError(f"{path}: two documents have the id {document.id!r}, expected different ones.")
        seen.add(document.id)
    return documents


def _records(path: Path) -> Iterator[Document]:
    for number, record in read_records(path):
        text, title, name = record.get("text"), record.get("title", ""), record.get("id", number)
        if not isinstance(text, str) or not text.strip() or not isinstance(title, str):
            found = ", ".join(record) or "(none)"
            raise DataError(f"{path}:{number}: found the keys {found}, expected a non-empty text (and title).")
        yield Document(str(name), text, title)


def _paragraphs(path: Path) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    paragraphs = (part.strip() for part in re.split(r"\n\s*\n", text))
    for number, paragraph in enumerate(filter(None, paragraphs), start=1):
        yield Document(str(number), paragraph)


class Index:
    """BM25 (Lucene's variant, k1 = 1.5, b = 0.75) over documents; words are lower-cased, none is left out.

    Source: Robertson and Zaragoza 2009; computed by bm25s (Lu 2024, arXiv:2407.03618).
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        """Indexes titles and texts.

        Raises:
          ConfigError: bm25s is not installed.
          DataError: no document has a word.
        """
        bm25s = _bm25s()
        self.documents = tuple(documents)
        words = self._words([f"{each.title} {each.text}" for each in self.documents])
        if not any(words):
            raise DataError(f"search: the {len(self.documents)} documents have no words, expected some.")
        self._index = bm25s.BM25(method="lucene", k1=1.5, b=0.75, backend="numpy")
        self._index.index(words, show_progress=False)
        self._known = frozenset(word for each in words for word in each)

    def _words(self, texts: list[str]) -> list[list[str]]:
        found: list[list[str]] = _bm25s().tokenize(
            texts, token_pattern=_WORD, stopwords=[], return_ids=False, show_progress=False
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
        """Reads and indexes the corpus.

        Raises:
          ConfigError: there is no corpus, or bm25s is not installed.
          DataError: the corpus cannot be used.
        """
        if not self.corpus:
            raise ConfigError("tools.search.corpus: got '', expected a JSONL or text file to search")
        index = Index(read_corpus(self.corpus))
        return Tool(
            name="search",
            description=f"Searches documents by words; gives the {self.results} that match best.",
            parameters={
                "type": "object",
                "properties": {"query": {"type": "string", "description": "words to look for"}},
                "required": ["query"],
                "additionalProperties": False,
            },
            run=lambda arguments: self.answer(index, arguments["query"]),
            version={"corpus": file_hash(Path(self.corpus))},
        )

    def answer(self, index: Index, query: str) -> str:
        """The documents that match best, as the model reads them."""
        found = index.top(query, self.results)
        return "\n\n".join(_shown(each, self.max_characters) for each, _ in found) or "no document matches"


def _shown(document: Document, most: int) -> str:
    text = document.text if len(document.text) <= most else f"{document.text[:most]}..."
    head = f"[{document.id}] {document.title}".strip()
    return f"{head}\n{text}"


def _bm25s() -> ModuleType:
    try:
        import bm25s  # imports jax and runs one small operation on its default device
    except ModuleNotFoundError as error:
        raise ConfigError("search: the package bm25s is missing; pip install 'temper[tools]'.") from error
    return bm25s


PROVIDES = {"tool": {"search": Search}}
