"""Context distillation: the teacher's rows, which have more context, aligned with the student's tokens."""

from typing import Any

import numpy as np

from research.core.batch import SequenceBatch


def teacher_rows(
    rows: SequenceBatch, context_ids: tuple[int, ...], bos_id: int | None
) -> tuple[SequenceBatch, np.ndarray]:
    """Rows `[B, T + C]` with the C tokens of context after BOS, or before the first token where that is no BOS.

    Returns the teacher's rows, and `[B, T]` its slot of each of the student's tokens. `rows` are padded on any side.

    Raises:
      ValueError: packed rows, because the context belongs to one sequence.
    """
    if rows.segment_ids.max(initial=0) > 1:
        raise ValueError("rows: got several sequences in a row, expected one (packing off) for distillation")
    B, T = rows.tokens.shape
    C = len(context_ids)
    real = rows.segment_ids > 0
    first = np.where(real.any(axis=1), real.argmax(axis=1), T - 1)
    starts_with_bos = rows.tokens[np.arange(B), first] == (-1 if bos_id is None else bos_id)
    at = first + starts_with_bos  # [B] where the context begins
    slots = np.arange(T)[None, :] + C * (np.arange(T)[None, :] >= at[:, None])
    line = np.arange(B)[:, None]

    def spread(values: np.ndarray, fill: Any) -> np.ndarray:
        wide = np.zeros((B, T + C), values.dtype)
        wide[line, at[:, None] + np.arange(C)[None, :]] = fill
        wide[line, slots] = values
        return wide

    segment_ids = spread(rows.segment_ids, real.any(axis=1, keepdims=True))
    teacher = SequenceBatch(
        tokens=spread(rows.tokens, np.array(context_ids, np.int32)[None, :]),
        loss_mask=spread(rows.loss_mask, False),
        segment_ids=segment_ids,
        positions=np.maximum(np.cumsum(segment_ids > 0, axis=1) - 1, 0).astype(np.int32),
        weights=rows.weights,
        first_target=rows.first_target + C,
        # With an empty prompt the context falls behind the row's first slots.
        group_size=rows.group_size if real[:, : rows.first_target].any(axis=1).all() else 1,
    )
    return teacher, slots.astype(np.int32)
