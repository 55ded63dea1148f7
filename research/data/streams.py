"""Endless, random-access sequences of rows or batches: item i is a pure function of (data, seed, i).

Grain numbers the items, so its iterators can be saved and restored by that number alone. An epoch's plan (its
order) is derived from (seed, epoch) and kept until the next epoch begins.
"""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

from research.data.examples import Documents, Examples
from research.data.packing import Row, assemble_row, best_fit_decreasing, concat_then_split, empty_row

Plan = TypeVar("Plan")
_EPOCHS = 2**31  # "forever": Grain wants a length


class _EpochStream(Generic[Plan]):
    """`per_epoch` items an epoch, `_EPOCHS` epochs; subclasses say what a plan and an item are."""

    def __init__(self, per_epoch: int) -> None:
        self._per_epoch = per_epoch
        self._latest: tuple[int, Plan] | None = None

    def __len__(self) -> int:
        return self._per_epoch * _EPOCHS

    def __getitem__(self, index: int) -> Row:
        epoch, within = divmod(int(index), self._per_epoch)
        latest = self._latest
        if latest is None or latest[0] != epoch:
            latest = self._latest = (epoch, self._plan(epoch))
        return self._item(latest[1], within)

    def _plan(self, epoch: int) -> Plan:
        raise NotImplementedError

    def _item(self, plan: Plan, index: int) -> Row:
        raise NotImplementedError


class TextStream(_EpochStream[tuple[np.ndarray, np.ndarray, np.ndarray]]):
    """Rows over documents, concatenated and split; `seed` None keeps every epoch in document order."""

    def __init__(self, documents: Documents, length: int, seed: tuple[int, int] | None, pad_id: int) -> None:
        self.rows_per_epoch = -(-len(documents.tokens) // length)
        super().__init__(self.rows_per_epoch)
        self._documents, self._length, self._seed, self._pad_id = documents, length, seed, pad_id

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lengths = self._documents.lengths
        if self._seed is None:
            return concat_then_split(lengths, self._length, phase=0, rng=None)
        rng = np.random.default_rng((*self._seed, epoch))
        phase = int(rng.integers(self._length))
        return concat_then_split(lengths, self._length, phase=phase, rng=rng)

    def _item(self, plan: tuple[np.ndarray, np.ndarray, np.ndarray], index: int) -> Row:
        starts, sizes, bounds = plan
        pieces = range(int(bounds[index]), int(bounds[index + 1]))
        parts = [self._documents.tokens[starts[piece] : starts[piece] + sizes[piece]] for piece in pieces]
        masks = [np.ones(len(part), np.bool_) for part in parts]
        return assemble_row(parts, masks, self._length, self._pad_id)


class PackedStream(_EpochStream[tuple[np.ndarray, np.ndarray]]):
    """Rows of whole examples. Each epoch swaps examples of equal length, and the rows' order."""

    def __init__(self, examples: Examples, length: int, seed: int, pad_id: int) -> None:
        self._lengths = examples.lengths
        # Slot k stands for the k-th longest example, so the layout holds for every epoch.
        self._rows = best_fit_decreasing(np.sort(self._lengths)[::-1], length)
        super().__init__(len(self._rows))
        self._examples, self._length, self._seed, self._pad_id = examples, length, seed, pad_id

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng((self._seed, epoch))
        order = rng.permutation(len(self._lengths))
        slots = order[np.argsort(-self._lengths[order], kind="stable")]
        return slots, rng.permutation(len(self._rows))

    def _item(self, plan: tuple[np.ndarray, np.ndarray], index: int) -> Row:
        slots, row_order = plan
        members = [int(slots[slot]) for slot in self._rows[row_order[index]]]
        tokens = [self._examples.tokens[member] for member in members]
        masks = [self._examples.loss_masks[member] for member in members]
        return assemble_row(tokens, masks, self._length, self._pad_id)


class BucketStream(_EpochStream[list[np.ndarray]]):
    """Batches of examples of like length, one a row, padded to the smallest bucket that holds them all.

    What does not fill a batch moves on to the next longer bucket; only an epoch's last batch may need empty
    rows, so an epoch is always `ceil(N / batch_size)` batches.
    """

    def __init__(self, examples: Examples, batch_size: int, buckets: Sequence[int], seed: int, pad_id: int) -> None:
        self._lengths = examples.lengths
        super().__init__(-(-len(self._lengths) // batch_size))
        self._buckets = np.asarray(buckets)
        self._bucket_of = np.searchsorted(self._buckets, self._lengths)
        self._examples, self._batch_size, self._seed, self._pad_id = examples, batch_size, seed, pad_id

    def _plan(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng((self._seed, epoch))
        order = rng.permutation(len(self._lengths))
        order = order[np.argsort(self._bucket_of[order], kind="stable")]
        batches = [order[i : i + self._batch_size] for i in range(0, len(order), self._batch_size)]
        return [batches[index] for index in rng.permutation(len(batches))]

    def _item(self, plan: list[np.ndarray], index: int) -> Row:
        members = plan[index].tolist()
        length = int(self._buckets[max(self._bucket_of[member] for member in members)])
        rows = [
            assemble_row([self._examples.tokens[member]], [self._examples.loss_masks[member]], length, self._pad_id)
            for member in members
        ]
        return stack_padded(rows, batch_size=self._batch_size, empty=empty_row(length, self._pad_id))


class PermutedStream(_EpochStream[np.ndarray]):
    """Each item once an epoch, in a new order."""

    def __init__(self, count: int, row: Callable[[int], Row], seed: int) -> None:
        super().__init__(count)
        self._row, self._seed = row, seed

    def _plan(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, epoch)).permutation(self._per_epoch)

    def _item(self, plan: np.ndarray, index: int) -> Row:
        return self._row(int(plan[index]))


class MismatchedStream(_EpochStream[np.ndarray]):
    """Each item once an epoch, in a new order, with the next item of another group in that order.

    `seed` None keeps every epoch in the order of the items.
    """

    def __init__(self, groups: np.ndarray, row: Callable[[int, int], Row], seed: int | None) -> None:
        super().__init__(len(groups))
        self._groups, self._row, self._seed = groups, row, seed

    def _plan(self, epoch: int) -> np.ndarray:
        if self._seed is None:
            return np.arange(len(self._groups))
        return np.random.default_rng((self._seed, epoch)).permutation(len(self._groups))

    def _item(self, plan: np.ndarray, index: int) -> Row:
        item, other = int(plan[index]), index
        for step in range(1, len(plan)):
            other = int(plan[(index + step) % len(plan)])
            if self._groups[other] != self._groups[item]:
                return self._row(item, other)
        raise ValueError("groups: all items are of one group, expected at least two")


class PromptStream(_EpochStream[np.ndarray]):
    """Batches without a repeated prompt: the records left over at the end of an epoch sit it out."""

    def __init__(self, count: int, batch_size: int, row: Callable[[int], Row], seed: int) -> None:
        super().__init__(count // batch_size)
        self._count, self._batch_size, self._row, self._seed = count, batch_size, row, seed

    def _plan(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, epoch)).permutation(self._count)

    def _item(self, plan: np.ndarray, index: int) -> Row:
        members = plan[index * self._batch_size : (index + 1) * self._batch_size]
        rows = [self._row(int(member)) for member in members]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


class Finite:
    """`count` rows in a fixed order."""

    def __init__(self, count: int, row: Callable[[int], Row]) -> None:
        self._count, self._row = count, row

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        return self._row(int(index))


def stack_padded(rows: Sequence[Row], *, batch_size: int, empty: Row) -> Row:
    """Stacks rows into a batch, filled up with `empty` rows."""
    filled = [*rows, *[empty] * (batch_size - len(rows))]
    return {key: np.stack([row[key] for row in filled]) for key in empty}
