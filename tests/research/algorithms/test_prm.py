"""Process and outcome reward models from tokens to loss, against NumPy from the scorer's outputs."""

from typing import Any

import numpy as np
import pytest

from research.algorithms.base import Setting
from research.algorithms.prm import PROVIDES, StepScorer, outcome
from research.train.step import eval_step
from tests.research.algorithms import hand
from tests.research.algorithms.toy import MODEL, host_batch, host_params


@pytest.fixture(scope="module")
def scorer() -> Any:
    return host_params(layout="step_scorer")


@pytest.mark.parametrize("supervision", ["process", "outcome"])
def test_equals_numpy_from_outputs(scorer: Any, supervision: Any) -> None:
    algorithm = StepScorer(supervision)
    batch = host_batch(algorithm)
    outputs, total, count = hand.outputs(scorer, batch.rows), 0.0, 0.0
    for b in range(8):
        steps = np.flatnonzero(batch.rows.loss_mask[b])
        labels = batch.step_labels[b, steps]
        if supervision == "outcome":
            steps, labels = steps[-1:], [min(labels, default=0)] * min(len(steps), 1)
        for t, label in zip(steps, labels, strict=True):
            logps = hand.log_softmax(outputs[b, t])
            total -= batch.rows.weights[b] * (label * logps[1] + (1 - label) * logps[0])
            count += batch.rows.weights[b]
    found = eval_step(scorer, batch, {}, algorithm=algorithm, config=MODEL)
    assert float(found["loss"].mean()) == pytest.approx(total / count, rel=1e-5)
    assert float(found["loss"].count) == pytest.approx(count)


def test_the_outcome_is_right_where_every_step_is_and_stands_at_the_last_step() -> None:
    mask = np.array([[0, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0] * 6], bool)
    labels = np.array([[0, 1, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1] * 6], np.float32)
    labels[~mask] = np.nan  # an unlabelled slot may hold anything
    last, label = outcome(labels, mask)
    assert [np.flatnonzero(row).tolist() for row in last] == [[5], [2], [0], []]
    assert [float(row[t]) for row, t in zip(label[:3], (5, 2, 0), strict=True)] == [1, 0, 1]


def test_the_config_finds_both() -> None:
    found = PROVIDES["objective"]
    made = {name: each.make(Setting({}, False, 2, 1)) for name, each in found.items()}
    assert made == {"prm": StepScorer("process"), "orm": StepScorer("outcome")}
    assert StepScorer("process") != StepScorer("outcome") and StepScorer().layout == "step_scorer"
    assert all(objective.given == "steps" and not objective.options for objective in found.values())
