"""Raw text for pretraining: a file, a folder of files, or the Python standard library's documentation."""

import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from research.core.errors import DataError
from research.data.jsonl import read_records, read_text
from research.data.split import Split
from research.data.stdlib_docs import read_stdlib_docs, stdlib_fingerprint
from research.data.store import Prepared, Row, Splits, file_hash, prepare

_SUFFIXES = (".txt", ".md", ".jsonl")
_MAX_CHARACTERS = 8000


def prepare_text_corpus(
    data_dir: str | Path, path: str, split: Split, *, max_bytes: int = 0, max_characters: int = _MAX_CHARACTERS
) -> Prepared:
    """Splits of documents {name, text}, by each document's text; DataError for what cannot be read.

    Args:
        data_dir: where prepared data sets live.
        path: a .txt, .md or .jsonl ({"text": ...} a line) file, or a folder of them, read recursively in the order of
            their paths; "" is the standard library's documentation.
        split: what is held out.
        max_bytes: stop reading the standard library's documentation there; 0 reads all.
        max_characters: longer texts are cut into documents at paragraph ends, else at line ends.
    """
    name = path or "standard library documentation"
    if path and max_bytes:
        raise DataError(f"{name}: data.text.max_bytes applies to the standard library's documentation only.")
    root = Path(path)
    files = _files(root) if path else {}

    def load() -> Splits:
        texts = _file_texts(files) if path else read_stdlib_docs(max_bytes=max_bytes)
        rows = [
            Row({"name": title, "text": part}, title)
            for title, text in texts
            for part in split_document(text, max_characters)
            if part.strip()
        ]
        return split.divide(rows, [row.record["text"] for row in rows], name=name)

    inputs: dict[str, object] = {"max_characters": max_characters, "split": asdict(split)}
    if path:
        inputs["files"] = {relative: file_hash(file) for relative, file in files.items()}
    else:
        inputs |= {"stdlib": dict(stdlib_fingerprint()), "max_bytes": max_bytes}
    return prepare("text", data_dir, inputs=inputs, load=load)


def split_document(text: str, max_characters: int) -> list[str]:
    """Parts of at most `max_characters` that join to the text, cut after paragraphs, else lines, else anywhere."""
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
                    parts += [piece] if len(piece) <= max_characters else split_document(piece, max_characters)
            return parts
    return [text[start : start + max_characters] for start in range(0, len(text), max_characters)]


def _files(path: Path) -> dict[str, Path]:
    """Files by their paths within the folder: two of one name in different folders stay apart."""
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        if not found:
            raise DataError(f"{path}: the folder holds no {', '.join(_SUFFIXES)} file.")
        return {file.relative_to(path).as_posix(): file for file in found}
    if path.suffix not in _SUFFIXES:
        raise DataError(f"{path}: expected a {', '.join(_SUFFIXES)} file or a folder of them.")
    return {path.name: path}


def _file_texts(files: dict[str, Path]) -> Iterator[tuple[str, str]]:
    for name, file in files.items():
        if file.suffix != ".jsonl":
            yield name, read_text(file)
            continue
        for number, record in read_records(file):
            if not isinstance(record.get("text"), str):
                raise DataError(f"{file}:{number}: found the keys {', '.join(record)}, expected text.")
            yield f"{name}:{number}", record["text"]
