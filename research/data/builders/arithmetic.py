"""The generated arithmetic task as a prepared data set."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from research.data.arithmetic import ArithmeticSpec, Item, split_items
from research.data.builders.base import Prepared, Record, RecordsBuilder, Splits, prepare

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


def _record(item: Item) -> Record:
    return {
        "prompt": item.prompt,
        "completion": item.solution,
        "answer": item.answer,
        "kind": item.kind,
        "steps": list(item.steps),
        "difficulty": item.difficulty,
    }
