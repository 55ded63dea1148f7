"""Solutions with labelled steps: from a JSONL or JSON file, in either shape of `research.data.steps`, or from
generated problems with right and wrong worked answers.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from research.data.builders.base import FLOATS, MESSAGES, Prepared, Record, RecordsBuilder, message_records
from research.data.builders.file import FileSpec, prepare_file
from research.data.steps import LabelledSteps, parse_steps
from research.tasks.arithmetic.build import prepare_corrupted
from research.tasks.arithmetic.corruption import step_records
from research.tasks.arithmetic.problems import ArithmeticSpec, Item

_FEATURES = {
    "prompt": MESSAGES,
    "steps": tfds.features.Sequence(tfds.features.Text()),
    "labels": FLOATS,  # NaN where nobody judged the step
}


class TemperSteps(RecordsBuilder):
    """Records {prompt, steps, labels}."""


def prepare_steps(data_dir: str | Path, spec: FileSpec) -> Prepared:
    """Splits "train" and "validation"; the prompt decides which, so one prompt is never in both."""

    def parse(record: Mapping[str, Any], where: str) -> Iterable[tuple[object, Record]]:
        solution = parse_steps(record, where=where)
        yield solution.prompt, _record(solution)

    return prepare_file(TemperSteps, data_dir, spec, features=_FEATURES, parse=parse)


def prepare_arithmetic_steps(
    data_dir: str | Path, *, n_train: int, n_validation: int, seed: int, spec: ArithmeticSpec | None = None
) -> Prepared:
    """Splits "train" and "validation" of generated problems, each with a right and a corrupted answer: two
    records a problem.
    """

    def records(item: Item, spec: ArithmeticSpec) -> list[Record]:
        both = step_records(item, seed=seed, max_value=spec.max_value)
        return [_record(parse_steps(record, where=item.prompt)) for record in both]

    sizes = {"n_train": n_train, "n_validation": n_validation, "seed": seed}
    return prepare_corrupted(TemperSteps, data_dir, **sizes, spec=spec, features=_FEATURES, records=records)


def _record(solution: LabelledSteps) -> Record:
    return {
        "prompt": message_records(solution.prompt),
        "steps": list(solution.steps),
        "labels": [math.nan if label is None else label for label in solution.labels],
    }
