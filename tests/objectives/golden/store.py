"""The file of numbers that TRL computed: named arrays and a JSON header, one compressed `.npz`."""

import json
import zipfile
from pathlib import Path

import numpy as np

PATH = Path(__file__).with_name("trl.npz")
LIMIT = 1_000_000  # bytes
HEADER = "header"


def save(arrays: dict[str, np.ndarray], header: dict[str, str]) -> int:
    """Writes the arrays and the header; returns the bytes on disk."""
    text = np.frombuffer(json.dumps(header, sort_keys=True).encode(), np.uint8)
    np.savez_compressed(PATH, **arrays, **{HEADER: text})  # type: ignore[arg-type]
    _drop_dates()
    size = PATH.stat().st_size
    if size > LIMIT:
        raise ValueError(f"{PATH.name}: got {size} bytes, expected at most {LIMIT}; use smaller shapes")
    return size


def load() -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays by name, and the header."""
    with np.load(PATH, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return arrays, json.loads(arrays.pop(HEADER).tobytes())


def _drop_dates() -> None:
    """The same numbers give the same bytes: a zip archive would otherwise hold the time of writing."""
    with zipfile.ZipFile(PATH) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(PATH, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in sorted(members):
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED, 9)
