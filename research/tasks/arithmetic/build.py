"""The generated arithmetic task as a prepared data set."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from research.data.builders.base import Prepared, Record, RecordsBuilder, Splits, prepare
from research.tasks.arithmetic.corruption import CORRUPTION
from research.tasks.arithmetic.problems import ArithmeticSpec, Item, split_items

_TEXT = tfds.features.Text()
_FEATURES = {
    "prompt": _TEXT,
    "completion": _TEXT,
    "answer": _TEXT,
    "kind": _TEXT,
    "steps": tfds.features.Sequence(_TEXT),
    "difficulty": np.int64,
}


class TemperArithmetic(RecordsBuilder):
    """Records {prompt, completion, answer, steps, difficulty, kind}."""


def prepare_arithmetic(
    data_dir: str | Path, *, n_train: int, n_test: int, seed: int, spec: ArithmeticSpec | None = None
) -> Prepared:
    """Splits "train" and "test", disjoint by content whatever the seeds and counts.

    `completion` is the worked solution with its last line "#### answer".
    """
    spec = spec or ArithmeticSpec()

    def load() -> Splits:
        train, test = split_items(n_train, n_test, seed=seed, spec=spec)
        return {"train": [_record(item) for item in train], "test": [_record(item) for item in test]}

    inputs = {"spec": asdict(spec), "n_train": n_train, "n_test": n_test, "seed": seed}
    return prepare(TemperArithmetic, data_dir, inputs=inputs, features=_FEATURES, load=load)


def prepare_corrupted(
    builder: type[RecordsBuilder],
    data_dir: str | Path,
    *,
    n_train: int,
    n_validation: int,
    seed: int,
    spec: ArithmeticSpec | None,
    features: Mapping[str, Any],
    records: Callable[[Item, ArithmeticSpec], Sequence[Record]],
    **inputs: int,
) -> Prepared:
    """Splits "train" and "validation" of what `records` makes of generated problems and wrong answers to them.

    The problems of the two are disjoint by content, and validation is of the problems that are held out from
    every training set.
    """
    spec = spec or ArithmeticSpec()

    def load() -> Splits:
        splits = split_items(n_train, n_validation, seed=seed, spec=spec)
        return {
            name: [record for item in items for record in records(item, spec)]
            for name, items in zip(("train", "validation"), splits, strict=True)
        }

    sizes = {"n_train": n_train, "n_validation": n_validation, "seed": seed}
    named = {"generator": "arithmetic", "corruption": CORRUPTION, "spec": asdict(spec), **sizes, **inputs}
    return prepare(builder, data_dir, inputs=named, features=features, load=load)


def _record(item: Item) -> Record:
    return {
        "prompt": item.prompt,
        "completion": item.solution,
        "answer": item.answer,
        "kind": item.kind,
        "steps": list(item.steps),
        "difficulty": item.difficulty,
    }
