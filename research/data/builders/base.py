"""What the builders share: a folder named by a hash of the inputs, written beside and renamed by TFDS.

    <data_dir>/<kind>/<hash>/1.0.0/{dataset_info.json, features.json, *.array_record-*}

Changed files or parameters hash differently and get a folder of their own; a second call reuses it.
"""

import contextlib
import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from research.core.errors import DataError
from research.data.chat import Message

Record = dict[str, Any]
Splits = Mapping[str, Sequence[Record]]

# Raise when the stored layout changes, so that folders of the old layout are not read.
_LAYOUT = 1
_BLOCK = 1024  # records read at once by iteration

_TEXT = tfds.features.Text()
MESSAGES = tfds.features.Sequence(
    {"role": _TEXT, "content": _TEXT, "thinking": _TEXT, "tool_calls": _TEXT}  # tool_calls: a JSON list
)

FLOATS = tfds.features.Sequence(np.float32)
INTS = tfds.features.Sequence(np.int64)


@dataclass
class RecordsConfig(tfds.core.BuilderConfig):
    """What one folder holds: its hash as `name`, its feature kinds, and its records (unless it exists)."""

    features: Mapping[str, Any] = field(default_factory=dict)
    splits: Splits = field(default_factory=dict)


class RecordsBuilder(tfds.core.GeneratorBasedBuilder):
    """Writes the records of its config in their order. Each kind of data set is a subclass, for its name."""

    VERSION = tfds.core.Version("1.0.0")
    builder_config: RecordsConfig

    def _create_builder_config(self, builder_config: RecordsConfig, version: Any) -> RecordsConfig:
        """Without TFDS's warning that the config was made at run time (which is the point of it)."""
        del version
        return builder_config

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(dict(self.builder_config.features)),
            disable_shuffling=True,  # record i stays record i: pipelines shuffle, and prompt_id is an index
        )

    def _split_generators(self, dl_manager: Any) -> Mapping[str, Any]:
        del dl_manager  # nothing is downloaded
        return {name: self._generate_examples(name) for name in self.builder_config.splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, Record]]:
        yield from enumerate(self.builder_config.splits[split])


class RecordSource:
    """Random access to one split: `source[i]` is a dict of texts, numbers and lists, in the order written.

    Records are read as raw `tf.train.Example`s and decoded here: TFDS's own decoder makes an array of every
    feature and costs several times as much.
    """

    def __init__(self, builder: RecordsBuilder, split: str) -> None:
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._raw = builder.as_data_source(split=split, deserialize_method=raw)
        self._features = dict(builder.builder_config.features)

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self._raw):
            raise IndexError(f"record {index} of {len(self._raw)}")
        return _decode(self._raw[int(index)], self._features)

    def __iter__(self) -> Iterator[Record]:
        """All records in order, read in blocks: ten times as fast as one by one."""
        for start in range(0, len(self._raw), _BLOCK):
            block = range(start, min(start + _BLOCK, len(self._raw)))
            for raw in self._raw.__getitems__(list(block)):
                yield _decode(raw, self._features)


@dataclass(frozen=True)
class Prepared:
    """A prepared data set: its splits, the name of its version, and what a run records about it."""

    splits: Mapping[str, RecordSource]
    version: str
    details: Mapping[str, Any]

    @property
    def train(self) -> RecordSource:
        """What is trained on."""
        return self._split("train")

    @property
    def validation(self) -> RecordSource:
        """Held out by content, for choosing between runs."""
        return self._split("validation")

    @property
    def test(self) -> RecordSource:
        """Held out by content, for reporting."""
        return self._split("test")

    def _split(self, name: str) -> RecordSource:
        if name not in self.splits:
            raise DataError(f"{self.version}: has no {name} split, expected one of {', '.join(self.splits)}.")
        return self.splits[name]


def prepare(
    builder: type[RecordsBuilder],
    data_dir: str | Path,
    *,
    inputs: Mapping[str, Any],
    features: Mapping[str, Any],
    load: Callable[[], Splits],
) -> Prepared:
    """Opens the folder that `inputs` hash to, writing it first if it does not exist.

    Args:
        builder: names the kind of data set.
        data_dir: where prepared data sets live.
        inputs: JSON-serialisable: parameters and content hashes, everything that the records depend on.
        features: TFDS feature of each key of a record.
        load: reads and validates the records; called only when the folder must be written.
    """
    text = json.dumps({"layout": _LAYOUT, "kind": builder.name, **inputs}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    config = RecordsConfig(name=digest[:16], features=features)
    opened = builder(data_dir=str(data_dir), config=config)
    if not opened.data_path.exists():
        config.splits = load()
        for name, records in config.splits.items():
            if not records:
                raise DataError(f"{builder.name}: the {name} split of {text} is empty, expected records.")
        _write(opened)
        opened = builder(data_dir=str(data_dir), config=RecordsConfig(name=digest[:16], features=features))
    splits = {name: RecordSource(opened, name) for name in opened.info.splits}
    sizes = {name: len(source) for name, source in splits.items()}
    version = f"{builder.name}-{digest[:16]}"
    return Prepared(splits, version, {**inputs, "version": version, "sha256": digest, "records": sizes})


def _write(builder: RecordsBuilder) -> None:
    """TFDS writes into `incomplete.*` beside the folder and renames it, quietly here."""
    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
        try:
            builder.download_and_prepare(
                download_dir=downloads, download_config=config, file_format="array_record"
            )
        except OSError:
            # Another process may have renamed its identical copy into place first.
            if not (builder.data_path / "dataset_info.json").exists():
                raise


def message_records(messages: Sequence[Message]) -> list[Record]:
    """Messages as the records of the `MESSAGES` feature."""
    return [
        {
            "role": message.role,
            "content": message.content,
            "thinking": message.thinking,
            "tool_calls": json.dumps(message.tool_calls),
        }
        for message in messages
    ]


def _decode(raw: bytes, features: Mapping[str, Any]) -> Record:
    """A record from a serialised `tf.train.Example`; messages come back as rows from their columns."""
    stored = tf_example_pb2.Example.FromString(raw).features.feature

    def texts(key: str) -> list[str]:
        return [text.decode() for text in stored[key].bytes_list.value]

    record: Record = {}
    for key, feature in features.items():
        if feature is MESSAGES:
            columns = [texts(f"{key}/{column}") for column in ("role", "content", "thinking", "tool_calls")]
            record[key] = [
                {"role": role, "content": content, "thinking": thinking, "tool_calls": json.loads(calls)}
                for role, content, thinking, calls in zip(*columns, strict=True)
            ]
        elif feature is np.int64 or feature is np.bool_:
            value = int(stored[key].int64_list.value[0])
            record[key] = bool(value) if feature is np.bool_ else value
        elif feature is np.float32:
            record[key] = float(stored[key].float_list.value[0])
        elif feature is INTS:
            record[key] = [int(value) for value in stored[key].int64_list.value]
        elif feature is FLOATS:
            record[key] = [float(value) for value in stored[key].float_list.value]
        else:
            record[key] = texts(key) if isinstance(feature, tfds.features.Sequence) else texts(key)[0]
    return record


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes; DataError if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


def split_by_content(
    records: Sequence[Record], contents: Sequence[str], *, validation_one_in: int, name: str
) -> Splits:
    """Train and validation splits; a hash of each record's content decides, so equal contents stay together.

    `validation_one_in` 0 makes no validation split.
    """
    if not records:
        raise DataError(f"{name}: holds no records, expected at least one.")
    if validation_one_in == 0:
        return {"train": records}
    splits: dict[str, list[Record]] = {"train": [], "validation": []}
    for record, content in zip(records, contents, strict=True):
        value = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big")
        splits["validation" if value % validation_one_in == 0 else "train"].append(record)
    for split, members in splits.items():
        if not members:
            raise DataError(
                f"{name}: with validation_one_in = {validation_one_in} none of its {len(records)} records "
                f"falls into the {split} split; choose another value (0: no validation split)."
            )
    return splits


def check_one_in(validation_one_in: int, *, name: str) -> None:
    """Refuses a share that would leave no training data."""
    if validation_one_in < 0 or validation_one_in == 1:
        raise DataError(f"{name}: validation_one_in is {validation_one_in}, expected 0 or at least 2.")
