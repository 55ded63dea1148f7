"""Invariants of the given-data losses on a real (tiny) model."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from research.algorithms.sft import NextToken
from research.batch import SequenceBatch
from research.data.packing import assemble_row, empty_row
from research.step import eval_step, reference_step
from tests.research.algorithms.toy import (
    ALGORITHMS,
    MODEL,
    host_batch,
    host_params,
    objective_scalars,
    one_device,
    quick_compilation,
)


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with quick_compilation(), jax.set_mesh(one_device()):
        yield


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
    algorithm = NextToken("chat")
    scalars, params = objective_scalars(algorithm), host_params()
    one, other = (
        jax.device_get(eval_step(params, batch, scalars, algorithm=algorithm, config=MODEL))
        for batch in (loose, packed)
    )
    assert one["loss"].count == other["loss"].count == sum(m[1:].sum() for m in masks)
    for key in ("loss", "nll", "entropy", "z_loss"):
        assert other[key].total == pytest.approx(one[key].total, rel=1e-5), key


def test_dpo_at_its_own_reference_is_log_2() -> None:
    algorithm = ALGORITHMS["dpo"]
    scalars, params = objective_scalars(algorithm), host_params()
    batch = reference_step(params, host_batch(algorithm), scalars, algorithm=algorithm, config=MODEL)
    # The very same pass gives the very same numbers; nothing else does.
    sums = jax.device_get(eval_step(params, batch, scalars, algorithm=algorithm, config=MODEL))
    assert float(sums["loss"].mean()) == pytest.approx(np.log(2), rel=1e-5)
    assert float(sums["reward_margin"].mean()) == pytest.approx(0, abs=1e-5)
    assert float(sums["loss"].count) == batch.chosen.weights.sum()


def test_dpo_reference_is_the_sum_over_the_targets() -> None:
    """Summed, not averaged: a mean would change the effective beta."""
    algorithm = ALGORITHMS["dpo"]
    batch, params = host_batch(algorithm), host_params()
    out = jax.device_get(
        reference_step(params, batch, objective_scalars(algorithm), algorithm=algorithm, config=MODEL)
    )
    sft = NextToken("chat")
    scalars = objective_scalars(sft, label_smoothing=0.0, z_loss_coef=0.0)
    for side, found in ((batch.chosen, out.ref_chosen_logps), (batch.rejected, out.ref_rejected_logps)):
        ones = side.replace(weights=np.eye(8, dtype=np.float32)[3])  # row 3 alone
        sums = eval_step(params, ones, scalars, algorithm=sft, config=MODEL)
        assert found[3] == pytest.approx(-float(sums["nll"].total), rel=1e-5)
