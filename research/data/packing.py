"""Rows from sequences of varying length, in numpy: padded, packed, or concatenated and split.

Legend: B rows, T row length. A row is a dict of
    tokens       [T] int32
    loss_mask    [T] bool   this token is a target that counts, predicted from those before it in its segment
    segment_ids  [T] int32  1, 2, ... per sequence; 0 is padding
    positions    [T] int32  restart at 0 in each segment
The first token of a segment is never a target, because nothing of its own segment comes before it.
"""

import bisect
from collections.abc import Iterable

import numpy as np

Row = dict[str, np.ndarray]


def assemble_row(parts: Iterable[tuple[np.ndarray, np.ndarray | bool]], length: int, pad_id: int) -> Row:
    """One row [length] of these (tokens, loss mask) one after the other, right-padded."""
    row = empty_row(length, pad_id)
    end = 0
    for segment, (tokens, mask) in enumerate(parts, start=1):
        start, end = end, end + len(tokens)
        row["tokens"][start:end] = tokens
        row["loss_mask"][start:end] = mask
        row["loss_mask"][start : start + 1] = False
        row["segment_ids"][start:end] = segment
        row["positions"][start:end] = np.arange(end - start)
    return row


def empty_row(length: int, pad_id: int) -> Row:
    """A row of padding: no segment, no target."""
    return {
        "tokens": np.full(length, pad_id, np.int32),
        "loss_mask": np.zeros(length, np.bool_),
        "segment_ids": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
    }


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of indices, no row longer than `capacity`: longest first, each into the fullest row it fits in.

    No sequence may be longer than `capacity`. The row count depends on the multiset of lengths alone, so permuting
    sequences of equal length reshuffles what shares a row and keeps the number of rows.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # free space -> rows that have it
    spaces: list[int] = []  # the keys of open_rows, sorted
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        size = int(lengths[index])
        slot = bisect.bisect_left(spaces, size)
        if slot == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[slot]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[slot]
        rows[row].append(index)
        if space > size:
            if space - size not in open_rows:
                open_rows[space - size] = []
                bisect.insort(spaces, space - size)
            open_rows[space - size].append(row)
    return rows


def concat_then_split(
    document_lengths: np.ndarray, length: int, *, phase: int, rng: np.random.Generator | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One epoch of rows over documents that lie end to end in one flat array.

    A document longer than a row is cut at `phase`, `phase + length`, `phase + 2 length` ... from its start.
    Pieces of exactly `length` are rows of their own; the shorter ones are shuffled, concatenated and split
    into rows. Whatever the phase and the shuffle, there are `ceil(total / length)` rows, the last one padded.

    Args:
        document_lengths: [N] tokens of each document.
        length: tokens in a row.
        phase: 0 <= phase < length; where the first cut falls (0: at `length`).
        rng: shuffles pieces and rows; None keeps full rows, then the shared ones, in document order.

    Returns:
        starts [P] and sizes [P] of pieces in the flat array, and bounds [rows + 1]: row r holds the pieces
        bounds[r]:bounds[r + 1].
    """
    document_starts = np.cumsum(document_lengths) - document_lengths
    starts, sizes = _pieces(document_starts, document_lengths, length, phase)
    full = sizes == length
    short_starts, short_sizes = starts[~full], sizes[~full]
    if rng is not None:
        order = rng.permutation(len(short_starts))
        short_starts, short_sizes = short_starts[order], short_sizes[order]
    short_starts, short_sizes = _split_at_rows(short_starts, short_sizes, length)
    short_rows = (np.cumsum(short_sizes) - short_sizes) // length
    full_starts = starts[full]
    n_short = int(short_rows[-1]) + 1 if len(short_rows) else 0
    # Shuffle the rows, then lay the pieces out in row order.
    n_rows = len(full_starts) + n_short
    rank = np.arange(n_rows) if rng is None else rng.permutation(n_rows)
    rows = np.concatenate([rank[: len(full_starts)], rank[len(full_starts) :][short_rows]])
    layout = np.argsort(rows, kind="stable")
    all_starts = np.concatenate([full_starts, short_starts])[layout]
    all_sizes = np.concatenate([np.full(len(full_starts), length), short_sizes])[layout]
    return all_starts, all_sizes, np.searchsorted(rows[layout], np.arange(n_rows + 1))


def _pieces(starts: np.ndarray, lengths: np.ndarray, size: int, phase: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts each document at phase, phase + size, ...; the last piece is what is left."""
    head = np.where(lengths > size, phase, 0)
    counts = -(-(lengths - head) // size)
    document = np.repeat(np.arange(len(lengths)), counts)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    offset = head[document] + nth * size
    body_sizes = np.minimum(size, lengths[document] - offset)
    has_head = head > 0
    return (np.concatenate([starts[has_head], starts[document] + offset]), np.concatenate([head[has_head], body_sizes]))


def _split_at_rows(starts: np.ndarray, sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the pieces that cross a multiple of `length` in their concatenation (each crosses at most one)."""
    ends = np.cumsum(sizes)
    begins = ends - sizes
    edge = (begins // length + 1) * length
    crosses = np.flatnonzero(ends > edge)
    kept = edge[crosses] - begins[crosses]
    tails = starts[crosses] + kept, sizes[crosses] - kept
    sizes = sizes.copy()
    sizes[crosses] = kept
    return np.insert(starts, crosses + 1, tails[0]), np.insert(sizes, crosses + 1, tails[1])
