"""Batches of the offline loop: weights of filling rows, and what an update is said to cost."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from research.algorithms.sft import NextToken
from research.core.batch import Batch, PreferenceBatch, SequenceBatch
from research.data.packing import assemble_row, empty_row
from research.train.batches import as_batch, count_tokens


def batch_of(arrays: dict[str, np.ndarray], given: str = "chat") -> Batch:
    stage: Any = SimpleNamespace(objective=SimpleNamespace(given=given))
    return as_batch(stage, NextToken(), arrays)


def stacked(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def row(*lengths: int) -> dict[str, np.ndarray]:
    parts = [np.arange(4, 4 + n, dtype=np.int32) for n in lengths]
    return assemble_row([(part, np.arange(len(part)) >= 2) for part in parts], 12, 0)


def test_rows_that_only_fill_the_batch_have_no_weight() -> None:
    batch = batch_of(stacked([row(5, 4), row(2), empty_row(12, 0)]))  # two tokens: all prompt
    assert isinstance(batch, SequenceBatch)
    assert batch.weights.tolist() == [1, 0, 0] and batch.weights.dtype == np.float32


def test_tokens_are_counted_where_they_have_weight() -> None:
    counts = count_tokens(batch_of(stacked([row(5, 4), row(2), row(12)])))
    assert counts["target_tokens"] == 3 + 2 + 10 and counts["real_tokens"] == 9 + 12
    positions = sum(range(5)) + sum(range(4)) + sum(range(12))  # tokens before each one, in its own segment
    assert counts["context"] == positions / 21


def test_both_sides_of_a_pair_count() -> None:
    sides = {"chosen": stacked([row(5), row(6)]), "rejected": stacked([row(9), row(4)])}
    arrays = {f"{side}_{key}": value for side, rows in sides.items() for key, value in rows.items()}
    arrays |= {"margins": np.zeros(2, np.float32), "soft_labels": np.array([1, 0.75], np.float32)}
    batch = batch_of(arrays, "preferences")
    assert isinstance(batch, PreferenceBatch) and batch.ref_chosen_logps is None
    assert batch.soft_labels.tolist() == [1, 0.75]
    counts = count_tokens(batch)
    assert counts["target_tokens"] == 3 + 4 + 7 + 2 and counts["real_tokens"] == 5 + 6 + 9 + 4


def test_an_empty_batch_costs_nothing() -> None:
    counts = count_tokens(batch_of(stacked([empty_row(12, 0)] * 2)))
    assert counts == {"target_tokens": 0, "real_tokens": 0, "context": 0.0}
