"""Step-DPO: which tokens are the step, and the contrast of them alone."""

from typing import Any

import jax
import numpy as np
import pytest

from research.algorithms.step_dpo import StepDPO, first_differing_step
from research.core.batch import PreferenceBatch
from research.train.step import eval_step, prepare_step
from tests.research.algorithms import hand
from tests.research.algorithms.toy import MODEL, STEP_END, frozen_models, objective_scalars, rows, with_garbage

N = STEP_END
CHOSEN = [
    [1, 7, 8, N, 9, 9, N, 7, N],  # differs at slot 5, ends at 6
    [1, 7, 8, N, 9, N],  # ends its step where the other goes on
    [1, 7, 8],  # the whole completion is one step, never ended
    [1, 7, 8, N],  # a prefix of the other: no step of its own
    [1, 7, 8, N],  # the same
    [1, 7, 9, N, 8],  # of weight 0
    [1, 8, N, 9, N],  # the first step differs
    [1, 7, N, 8, 9, 9, 9, 9, N, 8],  # a long one
]
REJECTED = [
    [1, 7, 8, N, 9, 8, 8, N],
    [1, 7, 8, N, 9, 8, N, 7],
    [1, 7, 9, 8],
    [1, 7, 8, N, 9, 7],
    [1, 7, 8, N],
    [1, 7, 8, N, 8],
    [1, 9, 9, 9, N, 8, N],
    [1, 7, N, 9, N, 8],
]
STEPS = [([5, 6], [5, 6, 7]), ([5], [5, 6]), ([2], [2, 3]), ([], [4, 5]), ([], []), ([], []), ([1, 2], [1, 2, 3, 4]), (
    [3, 4, 5, 6, 7, 8], [3, 4])]  # fmt: skip
WEIGHTS = np.array([1, 2, 1, 1, 1, 0, 0.5, 1], np.float32)
"""Slot 0 is the prompt."""


def pairs() -> PreferenceBatch:
    sides = []
    for texts in (CHOSEN, REJECTED):
        side = rows(lengths=np.array([len(text) for text in texts]), weights=WEIGHTS)
        tokens = np.zeros_like(side.tokens)
        for b, text in enumerate(texts):
            tokens[b, : len(text)] = text
        sides.append(side.replace(tokens=tokens))
    return PreferenceBatch(*sides, margins=np.zeros(8, np.float32), soft_labels=np.ones(8, np.float32))


def test_a_step_is_from_the_first_difference_to_the_line_break() -> None:
    found = first_differing_step(pairs(), (N,))
    for b, expected in enumerate(STEPS):
        for side in (0, 1):
            assert np.flatnonzero(found[side][b]).tolist() == expected[side], (b, side)


def test_equals_numpy_from_logits_and_leaves_out_pairs_without_a_step(policy: Any, reference: Any) -> None:
    algorithm, batch = StepDPO((N,)), pairs()
    scalars = objective_scalars(algorithm)
    batch = prepare_step(policy, batch, scalars, frozen_models(algorithm), algorithm=algorithm, config=MODEL)
    batch = jax.device_get(batch)
    sides = (batch.chosen, batch.rejected)
    ratios = [hand.token_logps(policy, side) - hand.token_logps(reference, side) for side in sides]
    losses, weights = [], []
    for b in (0, 1, 2, 6, 7):
        x = [ratios[side][b, STEPS[b][side]].sum() for side in (0, 1)]
        d = 0.5 * (x[0] - x[1])
        losses.append(-0.9 * np.log(hand.sigmoid(d)) - 0.1 * np.log(hand.sigmoid(-d)))
        weights.append(WEIGHTS[b])
    for part in (batch, with_garbage(batch)):
        found = eval_step(policy, part, scalars, algorithm=algorithm, config=MODEL)
        assert float(found["loss"].mean()) == pytest.approx(hand.mean(np.array(losses), np.array(weights)), rel=1e-5)
        assert float(found["loss"].count) == 5.5
        assert float(found["no_step"].mean()) == pytest.approx(2 / 7.5)


def test_without_a_token_that_ends_a_step_it_refuses() -> None:
    with pytest.raises(ValueError, match="step_end_ids: got none"):
        first_differing_step(pairs(), ())
