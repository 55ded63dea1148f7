"""Preference pairs from a JSONL or JSON file, in any of the shapes of `research.data.preferences`."""

from dataclasses import dataclass
from pathlib import Path

from research.data.builders.base import (
    MESSAGES,
    Prepared,
    RecordsBuilder,
    Splits,
    check_one_in,
    file_hash,
    message_records,
    prepare,
    split_by_content,
)
from research.data.jsonl import read_records
from research.data.preferences import parse_preference


@dataclass(frozen=True)
class PreferenceSpec:
    """`path`: the file. `validation_one_in`: share held out, 0 for none."""

    path: str
    validation_one_in: int = 10


class TemperPreferences(RecordsBuilder):
    """Records {prompt, chosen, rejected}, each a list of messages."""


def prepare_preferences(data_dir: str | Path, spec: PreferenceSpec) -> Prepared:
    """Splits "train" and "validation"; the prompt decides which, so one prompt is never in both."""
    path = Path(spec.path)
    check_one_in(spec.validation_one_in, name=spec.path)

    def load() -> Splits:
        records, prompts = [], []
        for number, record in read_records(path):
            pair = parse_preference(record, where=f"{path}:{number}")
            sides = {"prompt": pair.prompt, "chosen": (pair.chosen,), "rejected": (pair.rejected,)}
            records.append({key: message_records(messages) for key, messages in sides.items()})
            prompts.append(repr(pair.prompt))
        return split_by_content(records, prompts, validation_one_in=spec.validation_one_in, name=spec.path)

    inputs = {
        "file": path.name,
        "file_sha256": file_hash(path),
        "validation_one_in": spec.validation_one_in,
    }
    features = {"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES}
    return prepare(TemperPreferences, data_dir, inputs=inputs, features=features, load=load)
