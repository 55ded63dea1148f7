"""Raw text for pretraining: a file, a folder of files, or the Python standard library's documentation."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tensorflow_datasets as tfds

from research.core.errors import DataError
from research.data.builders.base import (
    Prepared,
    RecordsBuilder,
    Splits,
    check_one_in,
    file_hash,
    prepare,
    split_by_content,
)
from research.data.jsonl import read_records
from research.data.stdlib_docs import read_stdlib_docs, stdlib_fingerprint

_SUFFIXES = (".txt", ".md", ".jsonl")


@dataclass(frozen=True)
class TextSpec:
    """Which text, and how it becomes documents.

    Attributes:
        path: a .txt, .md or .jsonl ({"text": ...} a line) file, or a folder of them (read recursively, in the
            order of their names). None: the standard library's documentation.
        max_characters: longer texts are cut into documents at paragraph ends, else at line ends.
        max_bytes: stop reading the standard library's documentation there.
        validation_one_in: share of documents held out by a hash of their content, 0 for none.
    """

    path: str | None = None
    max_characters: int = 8000
    max_bytes: int | None = None
    validation_one_in: int = 20


class TemperTextCorpus(RecordsBuilder):
    """Records {name, text}."""


def prepare_text_corpus(data_dir: str | Path, spec: TextSpec) -> Prepared:
    """Splits "train" and "validation" of the documents of a corpus."""
    name = spec.path or "standard library documentation"
    check_one_in(spec.validation_one_in, name=name)
    if spec.max_characters < 1:
        raise DataError(f"{name}: max_characters is {spec.max_characters}, expected at least 1.")
    if spec.path is not None and spec.max_bytes is not None:
        raise DataError(f"{name}: max_bytes applies to the standard library's documentation only.")
    files = _files(Path(spec.path)) if spec.path is not None else ()

    def load() -> Splits:
        texts = (
            _file_texts(files)
            if spec.path is not None
            else read_stdlib_docs(max_bytes=spec.max_bytes).documents
        )
        records = [
            {"name": title, "text": part}
            for title, text in texts
            for part in split_document(text, spec.max_characters)
            if part.strip()
        ]
        contents = [record["text"] for record in records]
        return split_by_content(records, contents, validation_one_in=spec.validation_one_in, name=name)

    if spec.path is not None:
        inputs: dict[str, object] = {"files": {file.name: file_hash(file) for file in files}}
    else:
        inputs = {"stdlib": dict(stdlib_fingerprint()), "max_bytes": spec.max_bytes}
    inputs |= {"max_characters": spec.max_characters, "validation_one_in": spec.validation_one_in}
    features = {"name": tfds.features.Text(), "text": tfds.features.Text()}
    return prepare(TemperTextCorpus, data_dir, inputs=inputs, features=features, load=load)


def split_document(text: str, max_characters: int) -> list[str]:
    """Parts of at most `max_characters` that join to the text, cut after paragraphs, else lines, else where
    they are full.
    """
    parts: list[str] = []
    for pattern in (r"(?<=\n\n)(?=[^\n])", r"(?<=\n)"):
        if len(text) <= max_characters:
            break
        pieces = [piece for piece in re.split(pattern, text) if piece]
        if len(pieces) > 1:
            for piece in pieces:
                if parts and len(parts[-1]) + len(piece) <= max_characters:
                    parts[-1] += piece
                else:
                    parts += (
                        [piece] if len(piece) <= max_characters else split_document(piece, max_characters)
                    )
            return parts
    return [text[start : start + max_characters] for start in range(0, len(text), max_characters)]


def _files(path: Path) -> tuple[Path, ...]:
    if path.is_dir():
        files = tuple(sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file()))
        if not files:
            raise DataError(f"{path}: the folder holds no {', '.join(_SUFFIXES)} file.")
        return files
    if path.suffix not in _SUFFIXES:
        raise DataError(f"{path}: expected a {', '.join(_SUFFIXES)} file or a folder of them.")
    return (path,)


def _file_texts(files: tuple[Path, ...]) -> Iterator[tuple[str, str]]:
    for file in files:
        if file.suffix == ".jsonl":
            for number, record in read_records(file):
                if not isinstance(record.get("text"), str):
                    raise DataError(f"{file}:{number}: found the keys {', '.join(record)}, expected text.")
                yield f"{file.name}:{number}", record["text"]
        else:
            try:
                yield file.name, file.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file}: is not UTF-8 text ({error.reason} at byte {error.start})."
                ) from error
