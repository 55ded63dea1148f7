"""Reads JSONL files, and `.json` files that hold one list, as numbered records."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from research.core.errors import DataError

Record = dict[str, Any]


def read_records(path: str | Path) -> Iterator[tuple[int, Record]]:
    """Yields `(number, record)`: the 1-based line of a JSONL file, or the 1-based entry of a JSON list.

    A `.json` file is a list; any other suffix is one JSON object a line (blank lines are skipped).

    Raises:
        DataError: the file is missing, empty or not UTF-8, or a line is not one JSON object.
    """
    path = Path(path)
    text = _read_text(path)
    records = _list_records(path, text) if path.suffix == ".json" else _line_records(path, text)
    empty = True
    for number, record in records:
        empty = False
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, got {type(record).__name__}.")
        yield number, record
    if empty:
        raise DataError(f"{path}: holds no records, expected at least one.")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


def _line_records(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    # Not splitlines(): U+2028 and friends may stand unescaped inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}:{number}: is not valid JSON ({error.msg} at column {error.colno})."
                ) from error


def _list_records(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    try:
        records = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: is not valid JSON ({error.msg} at column {error.colno})."
        ) from error
    if not isinstance(records, list):
        raise DataError(
            f"{path}: expected a JSON list of records, got {type(records).__name__} "
            "(one object a line belongs in a .jsonl file)."
        )
    yield from enumerate(records, start=1)
