"""What builders that read one file share: records parsed line by line, split by a hash of their prompt."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.data.builders.base import (
    Prepared,
    Record,
    RecordsBuilder,
    Splits,
    check_one_in,
    file_hash,
    prepare,
    split_by_content,
)
from research.data.jsonl import read_records

Parse = Callable[[Mapping[str, Any], str], Iterable[tuple[object, Record]]]
"""(record, where) -> the prompt and what is stored, for each example of the record."""


@dataclass(frozen=True)
class FileSpec:
    """`path`: the file. `validation_one_in`: share held out, 0 for none."""

    path: str
    validation_one_in: int = 10


def prepare_file(
    builder: type[RecordsBuilder],
    data_dir: str | Path,
    spec: FileSpec,
    *,
    features: Mapping[str, Any],
    parse: Parse,
    **inputs: Any,
) -> Prepared:
    """Splits "train" and "validation"; the prompt decides which, so one prompt is never in both.

    Args:
        builder: names the kind of data set.
        data_dir: where prepared data sets live.
        spec: the file.
        features: TFDS feature of each key of a record.
        parse: reads one record.
        inputs: what else the records depend on, JSON-serialisable.
    """
    path = Path(spec.path)
    check_one_in(spec.validation_one_in, name=spec.path)

    def load() -> Splits:
        records, prompts = [], []
        for number, record in read_records(path):
            for prompt, stored in parse(record, f"{path}:{number}"):
                records.append(stored)
                prompts.append(repr(prompt))
        return split_by_content(records, prompts, validation_one_in=spec.validation_one_in, name=spec.path)

    named = {"file": path.name, "file_sha256": file_hash(path), "validation_one_in": spec.validation_one_in}
    return prepare(builder, data_dir, inputs={**named, **inputs}, features=features, load=load)
