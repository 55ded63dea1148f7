"""Losses and implicit rewards of held-out rows against an independent loop over the model's log-probs."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from research.core.batch import SequenceBatch
from research.core.errors import DataError
from research.core.network import Network
from research.evals.held_out import PreferenceAccuracy, ValidationLoss
from research.evals.policy import TrainedPolicy
from tests.research.algorithms import hand
from tests.research.algorithms.toy import MODEL, host_params, one_device, quick_compilation

B, T = 4, 9


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with quick_compilation(), jax.set_mesh(one_device()):
        yield


def arrays(seed: int, *, real: int = B, prefix: str = "") -> dict[str, np.ndarray]:
    """Rows of very different lengths; those beyond `real` only fill the batch."""
    rng = np.random.default_rng(seed)
    lengths = np.where(np.arange(B) < real, rng.integers(3, T + 1, B), 0)
    seen = np.arange(T) < lengths[:, None]
    mask = seen & (np.arange(T) >= rng.integers(1, 3, B)[:, None])
    found = {
        "tokens": np.where(seen, rng.integers(1, MODEL.vocab_size, (B, T)), 0).astype(np.int32),
        "loss_mask": mask,
        "segment_ids": seen.astype(np.int32),
        "positions": np.where(seen, np.arange(T), 0).astype(np.int32),
    }
    return {f"{prefix}{name}": value for name, value in found.items()}


def policy(**sources: Any) -> TrainedPolicy:
    nothing: Any = None
    settings: Any = SimpleNamespace(problems=2)
    return TrainedPolicy(host_params(), MODEL, one_device(), nothing, nothing, settings, nothing, nothing, **sources)


def sums(params: Any, found: dict[str, np.ndarray], prefix: str = "") -> tuple[np.ndarray, np.ndarray]:
    """[B] log-probs of the targets, and their number, token by token."""
    rows = SequenceBatch.from_arrays(found, prefix)
    logps = hand.token_logps(params, rows)
    return np.where(rows.loss_mask, logps, 0.0).sum(axis=1), rows.loss_mask.sum(axis=1)


def test_validation_loss_is_of_each_row_and_skips_filling() -> None:
    batches = [arrays(0), arrays(1, real=2), arrays(2)]
    found = dict(ValidationLoss(max_batches=2).run(policy(row_arrays=lambda: batches), 0))
    expected, counts = [], []
    for batch, real in ((batches[0], B), (batches[1], 2)):
        total, count = sums(host_params(), batch)
        expected += (-total / np.maximum(count, 1))[:real].tolist()
        counts += count[:real].tolist()
    np.testing.assert_allclose(found["eval/validation_loss"], expected, rtol=1e-5)
    assert found["eval/validation_tokens"].tolist() == counts
    assert (
        len(dict(ValidationLoss(max_batches=0).run(policy(row_arrays=lambda: batches), 0))["eval/validation_loss"])
        == 10
    )
    with pytest.raises(DataError, match="no held-out rows"):
        dict(ValidationLoss().run(policy(row_arrays=list), 0))


def test_preference_accuracy_is_by_implicit_rewards_relative_to_the_reference() -> None:
    other = jax.tree.map(lambda x: x * 1.1 + 0.01, host_params())
    pairs = {**arrays(3, real=3, prefix="chosen_"), **arrays(4, real=3, prefix="rejected_")}
    pairs |= {"margins": np.zeros(B, np.float32), "soft_labels": np.ones(B, np.float32)}
    made = policy(pair_arrays=lambda: [pairs], reference=lambda: Network(other, MODEL))
    found = dict(PreferenceAccuracy().run(made, 0))
    implicit = {
        side: sums(host_params(), pairs, f"{side}_")[0] - sums(other, pairs, f"{side}_")[0]
        for side in ("chosen", "rejected")
    }
    margin = (implicit["chosen"] - implicit["rejected"])[:3]
    np.testing.assert_allclose(found["eval/preference_margin"], margin, rtol=1e-3, atol=1e-4)
    assert found["eval/preference_accuracy"].tolist() == (margin > 0).astype(float).tolist()
    same = policy(pair_arrays=lambda: [pairs], reference=lambda: Network(host_params(), MODEL))
    assert dict(PreferenceAccuracy().run(same, 0))["eval/preference_accuracy"].tolist() == [0.5] * 3
