"""Reads JSONL files, and `.json` files that hold one list, as numbered records."""

import contextlib
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
        DataError: the file is missing, empty or not UTF-8, or a line is not one JSON object of valid Unicode.
    """
    path = Path(path)
    empty = True
    for number, record in _entries(path, read_text(path)):
        empty = False
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, got {type(record).__name__}.")
        yield number, record
    if empty:
        raise DataError(f"{path}: holds no records, expected at least one.")


def read_text(path: Path) -> str:
    """A whole file of UTF-8, a byte order mark left out; DataError if it cannot be read."""
    with reading(path):
        return path.read_text(encoding="utf-8-sig")


@contextlib.contextmanager
def reading(path: Path, failed: str = "cannot be read") -> Iterator[None]:
    """Turns what goes wrong while a file is read into a DataError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except OSError as error:
        raise DataError(f"{path}: {failed} ({error.strerror}).") from error
    except ValueError as error:  # a NUL in the path
        raise DataError(f"{str(path)!r}: {failed} ({error}).") from error


def _entries(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    if path.suffix != ".json":
        # Not splitlines(): U+2028 and friends may stand unescaped inside a JSON string.
        lines = enumerate(text.split("\n"), start=1)
        yield from ((number, _parse(line, f"{path}:{number}")) for number, line in lines if line.strip())
        return
    records = _parse(text, str(path)) if text.strip() else []
    if not isinstance(records, list):
        raise DataError(
            f"{path}: expected a JSON list of records, got {type(records).__name__} "
            "(one object a line belongs in a .jsonl file)."
        )
    yield from enumerate(records, start=1)


def _parse(text: str, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        DataError: no JSON, nested too deeply, a number of thousands of digits, or half of a surrogate pair.
    """
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate has no UTF-8
        return value
    except json.JSONDecodeError as error:
        place = where if error.lineno == 1 else f"{where}:{error.lineno}"
        raise DataError(
            f"{place}: is not valid JSON ({error.msg.removesuffix(' at')} at column {error.colno})."
        ) from error
    except RecursionError as error:
        raise DataError(f"{where}: is nested too deeply to be read as JSON.") from error
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: holds half of a surrogate pair, expected valid Unicode.") from error
    except ValueError as error:  # Python refuses integers of more than 4,300 digits
        raise DataError(f"{where}: cannot be read as JSON ({str(error).partition(';')[0]}).") from error
