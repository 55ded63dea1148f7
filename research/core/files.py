"""Files that are either whole or absent: written beside their place, synced, then renamed into it."""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from research.core.errors import WorkdirError


def explain_os_error(error: OSError, path: Path | str) -> str:
    """One clear sentence for an `OSError` met while `path` was being written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{path}: no space left on the device; free some space or choose another working directory."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{path}: cannot be written ({error.strerror}); choose a directory that you may write to."
    return f"{path}: cannot be written ({error.strerror or error})."


@contextlib.contextmanager
def explained(path: Path | str) -> Iterator[None]:
    """Raises WorkdirError, in the words of `explain_os_error`, for an `OSError` met while `path` is written."""
    try:
        yield
    except OSError as error:
        raise WorkdirError(explain_os_error(error, path)) from error


def sync_directory(path: Path) -> None:
    """Makes renames inside the directory `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network mounts may not do this
            raise
    finally:
        os.close(handle)


def write_bytes_atomic(path: Path | str, data: bytes) -> None:
    """Writes `data` to `path`: readers, and whoever comes after a crash, see the old file or the new one.

    WorkdirError where the disk is full or the folder cannot be written; `path` is then as it was.
    """
    path = Path(path)
    beside = _beside(path)
    try:
        with explained(path):
            with open(beside, "xb") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX)  # says that its writer lives, see `remove_leftovers`
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
                os.replace(beside, path)
            sync_directory(path.parent)
    finally:
        beside.unlink(missing_ok=True)  # gone already where the rename took place


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def remove_leftovers(folder: Path | str) -> None:
    """Removes what killed writers of this module have left under `folder`, but for folders of checkpoints.

    A living writer holds its file locked, from the moment after it made it.
    """
    for where, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if name != "checkpoints"]
        for path in (Path(where, name) for name in names if name.startswith(".") and name.endswith(".tmp")):
            with contextlib.suppress(FileNotFoundError, BlockingIOError), open(path, "rb") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(handle.fileno()).st_mtime > 1.0:
                    path.unlink()


def write_text_atomic(path: Path | str, text: str) -> None:
    """Writes `text` as UTF-8, a lone surrogate as `\\udXXX`, which JSON reads back; see `write_bytes_atomic`."""
    write_bytes_atomic(path, text.encode("utf-8", "backslashreplace"))


def write_json_atomic(path: Path | str, obj: Any) -> None:
    """Writes `obj` as indented JSON with sorted keys; see `write_bytes_atomic`.

    WorkdirError too where `obj` holds something JSON cannot express (NaN and infinity included).
    """
    try:
        text = json.dumps(obj, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise WorkdirError(f"{path}: cannot be written as JSON ({error}).") from error
    write_text_atomic(path, text + "\n")


def read_json(path: Path | str) -> Any:
    """Reads what `write_json_atomic` wrote; WorkdirError where it cannot be read or something else has changed it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise WorkdirError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise WorkdirError(f"{path}: is not the JSON file that Temper wrote there ({error}).") from error


def make_folder(path: Path | str) -> Path:
    """Creates the folder `path` with its parents and returns it; WorkdirError where it cannot be, or is a file."""
    path = Path(path)
    with explained(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise WorkdirError(f"{path}: expected a folder, found a file.") from error
    return path


def fit_for_path(text: str) -> str:
    """A part of a folder's name: letters, digits and `_.=+-`, at most 60 of them."""
    return re.sub(r"[^\w.=+]+", "-", text).strip("-.")[:60] or "run"


def check_writable(path: Path | str) -> None:
    """Raises WorkdirError where `path` could not be written later; creates its folder, for a moment a file in it."""
    path = Path(path)
    if path.is_dir():
        raise WorkdirError(f"{path}: expected a file, found a folder.")
    beside = _beside(make_folder(path.parent) / path.name)
    write_bytes_atomic(beside, b"")
    beside.unlink()


def to_plain_json(obj: Any, where: str = "", *, finite: bool = True) -> Any:
    """A deep copy of `obj` in JSON's own types (tuples become lists), which reads back equal to itself.

    WorkdirError for the dotted key, in the object `where`, whose value would not survive: another type, a key that is
    no string, and, unless they may be there, NaN and infinity, which JSON proper does not have.
    """
    if isinstance(obj, Mapping):
        for key in obj:
            if not isinstance(key, str):
                raise WorkdirError(f"{where or 'top level'}: got the key {key!r}, expected string keys.")
        return {k: to_plain_json(v, f"{where}.{k}" if where else k, finite=finite) for k, v in obj.items()}
    if isinstance(obj, list | tuple):
        return [to_plain_json(value, f"{where}[{i}]", finite=finite) for i, value in enumerate(obj)]
    if isinstance(obj, float):
        if finite and not math.isfinite(obj):
            raise WorkdirError(f"{where or 'top level'}: got {obj}, expected a finite number.")
        return float(obj)
    if obj is None or isinstance(obj, bool | int | str):
        return obj
    kind = type(obj).__name__
    raise WorkdirError(f"{where or 'top level'}: got a value of type {kind}, expected what JSON can express.")


def first_difference(one: Mapping[str, str], other: Mapping[str, str], text: str, *, missing: str) -> str | None:
    """`text` with {key}, {one} and {other} of the first key whose values differ; None if none do."""
    keys = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    if not keys:
        return None
    found = text.format(key=keys[0] or "top level", one=one.get(keys[0], missing), other=other.get(keys[0], missing))
    return found + (f" (+{len(keys) - 1} more)" if keys[1:] else "")
