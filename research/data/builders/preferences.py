"""Preference pairs and judged completions: from a JSONL or JSON file, in any of the shapes of
`research.data.preferences`, or from generated problems with right and wrong worked answers.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from research.data.builders.base import MESSAGES, Prepared, Record, RecordsBuilder, message_records
from research.data.builders.file import FileSpec, prepare_file
from research.data.preferences import Preference, parse_judged, parse_preference
from research.tasks.arithmetic.build import prepare_corrupted
from research.tasks.arithmetic.corruption import pair_record
from research.tasks.arithmetic.problems import ArithmeticSpec, Item

_PAIR: dict[str, Any] = {
    "prompt": MESSAGES,
    "chosen": MESSAGES,
    "rejected": MESSAGES,
    "margin": np.float32,
    "label_probability": np.float32,
}


_JUDGED: dict[str, Any] = {"prompt": MESSAGES, "completion": MESSAGES, "label": np.bool_}


class TemperPreferences(RecordsBuilder):
    """Records {prompt, chosen, rejected}, each a list of messages, and {margin, label_probability}."""


class TemperJudged(RecordsBuilder):
    """Records {prompt, completion}, each a list of messages, and {label}: true where it is desirable."""


def prepare_preferences(data_dir: str | Path, spec: FileSpec) -> Prepared:
    """Splits "train" and "validation"; the prompt decides which, so one prompt is never in both."""

    def parse(record: Mapping[str, Any], where: str) -> Iterable[tuple[object, Record]]:
        pair = parse_preference(record, where=where)
        yield pair.prompt, _pair(pair)

    return prepare_file(TemperPreferences, data_dir, spec, features=_PAIR, parse=parse, fields=sorted(_PAIR))


def prepare_arithmetic_preferences(
    data_dir: str | Path, *, n_train: int, n_validation: int, seed: int, spec: ArithmeticSpec | None = None
) -> Prepared:
    """Splits "train" and "validation" of generated problems: the right worked answer over a corrupted one."""

    def records(item: Item, spec: ArithmeticSpec) -> list[Record]:
        pair = pair_record(item, seed=seed, max_value=spec.max_value)
        return [_pair(parse_preference(pair, where=item.prompt))]

    sizes = {"n_train": n_train, "n_validation": n_validation, "seed": seed}
    return prepare_corrupted(TemperPreferences, data_dir, **sizes, spec=spec, features=_PAIR, records=records)


def prepare_judged(data_dir: str | Path, spec: FileSpec) -> Prepared:
    """Splits "train" and "validation" of {prompt, completion, label} records or pairs, by prompt as above."""

    def parse(record: Mapping[str, Any], where: str) -> Iterable[tuple[object, Record]]:
        for judged in parse_judged(record, where=where):
            sides = {"prompt": judged.prompt, "completion": (judged.completion,)}
            stored: Record = {key: message_records(messages) for key, messages in sides.items()}
            yield judged.prompt, {**stored, "label": judged.desirable}

    return prepare_file(TemperJudged, data_dir, spec, features=_JUDGED, parse=parse, fields=sorted(_JUDGED))


def _pair(pair: Preference) -> Record:
    sides = {"prompt": pair.prompt, "chosen": (pair.chosen,), "rejected": (pair.rejected,)}
    stored: Record = {key: message_records(messages) for key, messages in sides.items()}
    return {**stored, "margin": pair.margin, "label_probability": pair.label_probability}
