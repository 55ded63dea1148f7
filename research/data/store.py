"""Prepared data: rows written once per content as ArrayRecord files by TFDS, and served by random access.

    <data_dir>/rows/<kind>-<hash>/1.0.0/    {dataset_info.json, features.json, *.array_record-*, sha256.json}
    <data_dir>/tokenizers/                  trained tokenizers
    <data_dir>/.lock                        held by the one process that writes
    <data_dir>/incomplete/                  where it writes; then the folder is renamed into its place

Changed files or parameters hash differently and get a folder of their own; a second call reuses it. A row is stored as
the JSON that it was read as, so every column comes back with its type.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from research.core.errors import DataError, WorkdirError
from research.core.files import explained, make_folder, read_json, write_json_atomic
from research.data.jsonl import reading
from research.data.records import Records

# Raise when the stored layout changes, so that folders of the old layout are not read.
_LAYOUT = 2
_BLOCK = 1024  # records read at once by iteration
_MANIFEST, _LOCK, _INCOMPLETE = "sha256.json", ".lock", "incomplete"


class Row(NamedTuple):
    """A record as it was read or made, and where ("" where that says nothing)."""

    record: Mapping[str, Any]
    place: str = ""


Splits = Mapping[str, Sequence[Row]]


@dataclass(frozen=True)
class Prepared:
    """Records to train on and records held out, with every column of the user's rows.

    Attributes:
        train, validation: the two splits.
        version: changes with the content; part of what a stage's result depends on.
        details: what a run records about the data, JSON.
    """

    train: Records
    validation: Records
    version: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class _Config(tfds.core.BuilderConfig):
    """Its kind and hash as `name`, and its rows, unless they have been written."""

    splits: Splits = field(default_factory=dict)


class _Rows(tfds.core.GeneratorBasedBuilder):
    """Writes the rows of its config in their order."""

    name = "rows"
    VERSION = tfds.core.Version("1.0.0")
    builder_config: _Config

    def _create_builder_config(self, builder_config: _Config, version: Any) -> _Config:
        """Without TFDS's warning that the config was made at run time (which is the point of it)."""
        del version
        return builder_config

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"row": text, "place": text}),
            disable_shuffling=True,  # record i stays record i: pipelines shuffle, and prompt_id is an index
        )

    def _split_generators(self, dl_manager: Any) -> Mapping[str, Any]:
        del dl_manager  # nothing is downloaded
        return {name: self._generate_examples(name) for name in self.builder_config.splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, str]]]:
        for index, row in enumerate(self.builder_config.splits[split]):
            yield index, {"row": json.dumps(row.record, ensure_ascii=False), "place": row.place}


class RecordSource:
    """Random access to one split: `source[i]` is the row as it was read, in the order written.

    Decodes raw `tf.train.Example`s: TFDS's own decoder makes an array of every feature and takes several times as long.
    """

    def __init__(self, builder: _Rows, split: str) -> None:
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._raw = builder.as_data_source(split=split, deserialize_method=raw)

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self._raw):
            raise IndexError(f"record {index} of {len(self._raw)}")
        return _record(self._raw[int(index)])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All records in order, read in blocks: ten times as fast as one by one."""
        for start in range(0, len(self._raw), _BLOCK):
            block = range(start, min(start + _BLOCK, len(self._raw)))
            yield from map(_record, self._raw.__getitems__(list(block)))

    def place(self, index: int) -> str:
        """File and line where the row was read, else its number."""
        return _column(self._raw[int(index)], "place") or f"record {index}"


def prepare(kind: str, data_dir: str | Path, *, inputs: Mapping[str, Any], load: Callable[[], Splits]) -> Prepared:
    """Opens the folder that `inputs` hash to, writing it first if it does not exist.

    Args:
        kind: of records, such as "preferences".
        data_dir: where prepared data sets live.
        inputs: JSON-serialisable: parameters and content hashes, everything that the rows depend on.
        load: reads and validates the rows of "train" and "validation"; called only when they must be written.

    Raises:
        DataError: a split would be empty, or the written files are damaged.
        WorkdirError: the folder cannot be written.
    """
    data_dir = Path(data_dir)
    text = json.dumps({"layout": _LAYOUT, "kind": kind, **inputs}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    version = f"{kind}-{digest[:16]}"
    folder = data_dir / _Rows.name / version / str(_Rows.VERSION)
    if not folder.exists():
        with writing(data_dir) as incomplete:
            if not folder.exists():  # else another process has written it meanwhile
                _write(version, load(), incomplete, folder, text)
    _verify(folder)
    builder = _Rows(data_dir=str(data_dir), config=_Config(name=version))
    splits = {name: RecordSource(builder, name) for name in ("train", "validation")}
    sizes = {name: len(source) for name, source in splits.items()}
    details = {**inputs, "version": version, "sha256": digest, "records": sizes}
    return Prepared(splits["train"], splits["validation"], version, details)


def _write(version: str, splits: Splits, incomplete: Path, place: Path, what: str) -> None:
    """Has TFDS write the rows into `incomplete`, notes the files' hashes, and renames the folder to `place`."""
    for name, rows in splits.items():
        if not rows:
            raise DataError(f"{version}: the {name} split of {what} is empty, expected records.")
    builder = _Rows(data_dir=str(incomplete), config=_Config(name=version, splits=splits))
    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    with explained(place):
        with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_dir=downloads, download_config=config, file_format="array_record")
        written = Path(builder.data_path)
        files = sorted(path for path in written.rglob("*") if path.is_file())
        write_json_atomic(written / _MANIFEST, {str(path.relative_to(written)): file_hash(path) for path in files})
        make_folder(place.parent)
        os.replace(written, place)


def _verify(folder: Path) -> None:
    """Raises DataError where a written file is missing or has changed."""
    try:
        damaged = [name for name, digest in read_json(folder / _MANIFEST).items() if file_hash(folder / name) != digest]
    except (WorkdirError, DataError) as error:
        raise DataError(f"{error} Delete {folder} to prepare the data again.") from error
    if damaged:
        raise DataError(
            f"{folder / damaged[0]}: is damaged, its hash is not the one noted when it was written; delete "
            f"{folder} to prepare the data again."
        )


@contextlib.contextmanager
def writing(data_dir: Path) -> Iterator[Path]:
    """Holds the data folder as its one writer and yields an empty folder for what is not complete yet.

    What killed writers have left is removed: nobody else writes while the lock is held.

    Raises:
        WorkdirError: the folder cannot be written.
    """
    make_folder(data_dir)
    lock = data_dir / _LOCK
    with explained(lock):
        handle = open(lock, "a")  # noqa: SIM115 - closed below, which releases the lock
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        _remove_leftovers(data_dir)
        try:
            yield make_folder(data_dir / _INCOMPLETE)
        finally:
            _remove_leftovers(data_dir)


def _remove_leftovers(data_dir: Path) -> None:
    shutil.rmtree(data_dir / _INCOMPLETE, ignore_errors=True)
    for path in (data_dir / "tokenizers").glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _column(raw: bytes, name: str) -> str:
    stored = tf_example_pb2.Example.FromString(raw).features.feature
    return str(stored[name].bytes_list.value[0].decode())


def _record(raw: bytes) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(_column(raw, "row"))
    return record


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes; DataError if it cannot be read."""
    with reading(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
