"""Rows neither lose, repeat nor mix tokens."""

import numpy as np
import pytest

from research.data.packing import assemble_row, best_fit_decreasing, concat_then_split


@pytest.mark.parametrize("seed", range(60))
def test_concat_then_split_covers_every_token_once(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, rng.integers(2, 60), size=rng.integers(1, 40))
    length = int(rng.integers(1, 20))
    ordered = seed % 5 == 0
    starts, sizes, bounds = concat_then_split(
        lengths, length, phase=0 if ordered else int(rng.integers(length)), rng=None if ordered else rng
    )
    total = int(lengths.sum())
    assert len(bounds) - 1 == -(-total // length)
    covered = np.concatenate([np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)])
    np.testing.assert_array_equal(np.sort(covered), np.arange(total))
    document = np.repeat(np.arange(len(lengths)), lengths)
    for start, size in zip(starts, sizes, strict=True):
        assert size > 0
        assert len(set(document[start : start + size])) == 1  # a piece never crosses documents
    fills = np.add.reduceat(sizes, bounds[:-1])
    assert (fills <= length).all()
    assert (fills < length).sum() <= 1


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_keeps_examples_whole_and_the_row_count_under_permutation(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 33, size=80)
    rows = best_fit_decreasing(lengths, 32)
    assert sorted(index for row in rows for index in row) == list(range(80))
    assert all(lengths[row].sum() <= 32 for row in rows)
    assert len(rows) <= 1.25 * lengths.sum() / 32 + 1
    assert len(best_fit_decreasing(rng.permutation(lengths), 32)) == len(rows)


def test_row_layout():
    masks = [np.array([True, True, True]), np.array([False, True])]
    row = assemble_row(zip([np.array([5, 6, 7]), np.array([8, 9])], masks, strict=True), 7, pad_id=1)
    assert row["tokens"].tolist() == [5, 6, 7, 8, 9, 1, 1]
    assert row["segment_ids"].tolist() == [1, 1, 1, 2, 2, 0, 0]
    assert row["positions"].tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert row["loss_mask"].tolist() == [False, True, True, False, True, False, False]
    assert {key: str(value.dtype) for key, value in row.items()} == {
        "tokens": "int32",
        "loss_mask": "bool",
        "segment_ids": "int32",
        "positions": "int32",
    }
