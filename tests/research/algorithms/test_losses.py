"""Invariants of the next-token loss on a real (tiny) model."""

import jax
import numpy as np
import pytest

from research.algorithms.sft import NextToken
from research.core.batch import SequenceBatch
from research.core.network import Network, batch_logps
from research.data.packing import assemble_row, empty_row
from research.train.step import eval_step
from tests.research.algorithms.toy import MODEL, host_params, objective_scalars


def as_batch(rows: list[dict[str, np.ndarray]]) -> SequenceBatch:
    arrays = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return SequenceBatch(weights=arrays["loss_mask"].any(axis=1).astype(np.float32), **arrays)


def test_packing_does_not_change_the_loss() -> None:
    rng = np.random.default_rng(0)
    lengths = [5, 7, 3, 9, 4]
    tokens = [rng.integers(4, MODEL.vocab_size, n).astype(np.int32) for n in lengths]
    masks = [np.arange(n) >= n // 2 for n in lengths]
    loose = as_batch([assemble_row([(t, m)], 12, 0) for t, m in zip(tokens, masks, strict=True)])
    packed = as_batch(
        [assemble_row([(tokens[i], masks[i]) for i in members], 12, 0) for members in ([0, 1], [2, 3], [4])]
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


@pytest.mark.parametrize("every_token", [False, True])
def test_long_rows_give_the_loss_of_their_targets_however_these_are_found(every_token: bool) -> None:
    """Rows of several chunks of the read-out, of which the targets fill one."""
    rng = np.random.default_rng(1)
    tokens = [rng.integers(4, MODEL.vocab_size, 150).astype(np.int32) for _ in range(2)]
    masks = [np.isin(np.arange(150), rng.choice(np.arange(1, 150), count, replace=False)) for count in (50, 7)]
    batch = as_batch([assemble_row([(t, m)], 160, 0) for t, m in zip(tokens, masks, strict=True)])
    scored = jax.jit(batch_logps, static_argnames="all_targets")(
        Network(host_params(), MODEL), batch, all_targets=every_token
    )
    assert (scored.logps != 0)[~batch.loss_mask].any() == every_token  # others are not asked for
    algorithm = NextToken(every_token=every_token)
    found = eval_step(host_params(), batch, objective_scalars(algorithm), algorithm=algorithm, config=MODEL)
    assert found["nll"].count == 57
    assert found["nll"].total == pytest.approx(-float(scored.logps[batch.loss_mask].sum()), rel=1e-5)
