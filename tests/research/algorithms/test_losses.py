"""Invariants of the next-token loss on a real (tiny) model."""

import jax
import numpy as np
import pytest

from research.algorithms.sft import NextToken
from research.batch import SequenceBatch
from research.data.packing import assemble_row, empty_row
from research.step import eval_step
from tests.research.algorithms.toy import MODEL, host_params, objective_scalars


def as_batch(rows: list[dict[str, np.ndarray]]) -> SequenceBatch:
    arrays = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return SequenceBatch(weights=arrays["loss_mask"].any(axis=1).astype(np.float32), **arrays)


def test_packing_does_not_change_the_loss() -> None:
    rng = np.random.default_rng(0)
    lengths = [5, 7, 3, 9, 4]
    tokens = [rng.integers(4, MODEL.vocab_size, n).astype(np.int32) for n in lengths]
    masks = [np.arange(n) >= n // 2 for n in lengths]
    loose = as_batch([assemble_row([t], [m], 12, 0) for t, m in zip(tokens, masks, strict=True)])
    packed = as_batch(
        [
            assemble_row([tokens[i] for i in members], [masks[i] for i in members], 12, 0)
            for members in ([0, 1], [2, 3], [4])
        ]
        + [empty_row(12, 0)] * 2
    )
    algorithm = NextToken()
    scalars, params = objective_scalars(algorithm), host_params()
    one, other = (
        jax.device_get(eval_step(params, batch, scalars, algorithm=algorithm, config=MODEL))
        for batch in (loose, packed)
    )
    assert one["loss"].count == other["loss"].count == sum(m[1:].sum() for m in masks)
    for key in ("loss", "nll", "entropy", "z_loss"):
        assert other[key].total == pytest.approx(one[key].total, rel=1e-5), key
