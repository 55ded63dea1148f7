"""Endless, random-access sequences of rows or batches: item i is a pure function of (data, seed, i).

Grain numbers the items, so its iterators can be saved and restored by that number alone. An epoch's plan (its
order) is derived from (seed, epoch) and kept until the next epoch begins.
"""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

from research.data.chat import Rendered
from research.data.examples import Documents, Examples
from research.data.packing import Row, assemble_row, best_fit_decreasing, concat_then_split, empty_row

Plan = TypeVar("Plan")
_EPOCHS = 2**31  # "forever": Grain wants a length


class EpochStream(Generic[Plan]):
    """`per_epoch` items an epoch, `_EPOCHS` epochs; `plan` lays out an epoch, `item` is one of it."""

    def __init__(self, per_epoch: int, plan: Callable[[int], Plan], item: Callable[[Plan, int], Row]) -> None:
        self.per_epoch, self._plan, self._item = per_epoch, plan, item
        self._latest: tuple[int, Plan] | None = None

    def __len__(self) -> int:
        return self.per_epoch * _EPOCHS

    def __getitem__(self, index: int) -> Row:
        epoch, within = divmod(int(index), self.per_epoch)
        latest = self._latest
        if latest is None or latest[0] != epoch:
            latest = self._latest = (epoch, self._plan(epoch))
        return self._item(latest[1], within)


Pieces = tuple[np.ndarray, np.ndarray, np.ndarray]


def text_rows(documents: Documents, length: int, seed: tuple[int, int] | None, pad_id: int) -> EpochStream[Pieces]:
    """Rows over documents, concatenated and split; `seed` None keeps every epoch in document order."""

    def plan(epoch: int) -> Pieces:
        if seed is None:
            return concat_then_split(documents.lengths, length, phase=0, rng=None)
        rng = np.random.default_rng((*seed, epoch))
        phase = int(rng.integers(length))
        return concat_then_split(documents.lengths, length, phase=phase, rng=rng)

    def row(pieces: Pieces, index: int) -> Row:
        starts, sizes, bounds = pieces
        members = range(int(bounds[index]), int(bounds[index + 1]))
        parts = (documents.tokens[starts[piece] : starts[piece] + sizes[piece]] for piece in members)
        return assemble_row(((part, True) for part in parts), length, pad_id)

    return EpochStream(-(-len(documents.tokens) // length), plan, row)


def packed_rows(examples: Examples, length: int, seed: int, pad_id: int) -> EpochStream[tuple[np.ndarray, np.ndarray]]:
    """Rows of whole examples. Each epoch swaps examples of equal length, and the rows' order."""
    lengths = examples.lengths
    # Slot k stands for the k-th longest example, so the layout holds for every epoch.
    rows = best_fit_decreasing(np.sort(lengths)[::-1], length)

    def plan(epoch: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(lengths))
        return order[np.argsort(-lengths[order], kind="stable")], rng.permutation(len(rows))

    def row(layout: tuple[np.ndarray, np.ndarray], index: int) -> Row:
        slots, row_order = layout
        members = (examples.rows[int(slots[slot])] for slot in rows[row_order[index]])
        return assemble_row(((each.tokens, each.loss_mask) for each in members), length, pad_id)

    return EpochStream(len(rows), plan, row)


def bucket_batches(
    examples: Examples, batch_size: int, buckets: Sequence[int], seed: int, pad_id: int
) -> EpochStream[list[np.ndarray]]:
    """Batches of examples of like length, one a row, padded to the smallest bucket that holds them all.

    What does not fill a batch moves on to the next longer bucket; only an epoch's last batch may need empty
    rows, so an epoch is always `ceil(N / batch_size)` batches.
    """
    bucket_of = np.searchsorted(np.asarray(buckets), examples.lengths)

    def plan(epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(bucket_of))
        order = order[np.argsort(bucket_of[order], kind="stable")]
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        return [batches[index] for index in rng.permutation(len(batches))]

    def batch(batches: list[np.ndarray], index: int) -> Row:
        members = batches[index].tolist()
        length = buckets[max(bucket_of[member] for member in members)]
        rows = [padded(examples.rows[member], length, pad_id) for member in members]
        return stack([*rows, *[empty_row(length, pad_id)] * (batch_size - len(rows))])

    return EpochStream(-(-len(bucket_of) // batch_size), plan, batch)


def permuted_rows(count: int, row: Callable[[int], Row], seed: int | None) -> EpochStream[np.ndarray]:
    """Each item once an epoch, in a new order; `seed` None keeps theirs."""
    return EpochStream(count, _orders(count, seed), lambda order, index: row(int(order[index])))


def mismatched_rows(groups: np.ndarray, row: Callable[[int, int], Row], seed: int | None) -> EpochStream[np.ndarray]:
    """As `permuted_rows`, each item with the next one in that order that is of another group; there must be two."""

    def pair(order: np.ndarray, index: int) -> Row:
        item = int(order[index])
        following = (int(order[(index + step) % len(order)]) for step in range(1, len(order)))
        return row(item, next(other for other in following if groups[other] != groups[item]))

    return EpochStream(len(groups), _orders(len(groups), seed), pair)


def prompt_groups(count: int, batch_size: int, row: Callable[[int], Row], seed: int) -> EpochStream[np.ndarray]:
    """Batches without a repeated prompt: the records left over at the end of an epoch sit it out."""

    def batch(order: np.ndarray, index: int) -> Row:
        return stack([row(int(member)) for member in order[index * batch_size : (index + 1) * batch_size]])

    return EpochStream(count // batch_size, _orders(count, seed), batch)


def _orders(count: int, seed: int | None) -> Callable[[int], np.ndarray]:
    """Of an epoch: the items in a new order; None keeps theirs."""

    def order(epoch: int) -> np.ndarray:
        return np.arange(count) if seed is None else np.random.default_rng((seed, epoch)).permutation(count)

    return order


def padded(example: Rendered, length: int, pad_id: int) -> Row:
    """One example a row."""
    return assemble_row([(example.tokens, example.loss_mask)], length, pad_id)


def stack(rows: Sequence[Row]) -> Row:
    """Rows as a batch."""
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
