"""Scores from learned reward models: where they are read, and how several become one."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from research.core.network import Network
from research.rewards.learned import ProcessScorer, RewardScorer, score_rows, step_probabilities
from tests.research.algorithms import hand
from tests.research.algorithms.toy import MODEL, host_params, one_device, quick_compilation, rollouts

LENGTHS = np.array([8, 1, 3, 5])


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with quick_compilation(), jax.set_mesh(one_device()):
        yield


@pytest.fixture(scope="module")
def rows() -> Any:
    """Prompts padded on the left, completions on the right."""
    drawn = rollouts(np.zeros(4), LENGTHS, group_size=2)
    return drawn.rows(np.arange(4), np.ones(4))


def scores(params: Any, rows: Any) -> np.ndarray:
    return np.array([hand.outputs(params, rows)[b, 3 + n - 1, 0] for b, n in enumerate(LENGTHS)])


def test_a_score_is_read_at_the_last_token_of_the_completion(rows: Any) -> None:
    params = host_params(layout="scorer")
    found = jax.jit(score_rows)(Network(params, MODEL), rows)
    np.testing.assert_allclose(found, scores(params, rows), rtol=1e-5, atol=1e-6)
    assert len(set(np.asarray(found).round(4))) == 4


@pytest.mark.parametrize("reduction", ["mean", "min", "mean_minus_variance"])
def test_an_ensemble_reduces_over_its_members(rows: Any, reduction: Any) -> None:
    members = [host_params(seed=seed, layout="scorer") for seed in (3, 4, 5)]
    each = np.stack([scores(params, rows) for params in members])
    expected = {
        "mean": each.mean(axis=0),
        "min": each.min(axis=0),
        "mean_minus_variance": each.mean(axis=0) - 0.5 * each.var(axis=0),
    }[reduction]
    networks = tuple(Network(params, MODEL) for params in members)
    found = RewardScorer(networks, one_device(), reduction, 0.5)(rows)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_step_probabilities_stand_at_the_steps_and_nowhere_else(rows: Any) -> None:
    params = host_params(layout="step_scorer")
    step_mask = rows.loss_mask & (np.arange(11) % 2 == 0)
    found = np.asarray(step_probabilities(Network(params, MODEL), rows, step_mask))
    outputs = hand.outputs(params, rows)
    for b in range(4):
        for t in range(11):
            expected = np.exp(hand.log_softmax(outputs[b, t]))[1] if step_mask[b, t] else 0.0
            assert found[b, t] == pytest.approx(expected, rel=1e-5), (b, t)
    assert step_mask.sum() > 5


def test_a_solution_without_a_step_has_the_lowest_score(rows: Any) -> None:
    probs, ends = np.zeros((2, 5), np.float32), np.zeros((2, 5), bool)
    probs[0, 1], probs[0, 3], ends[0, [1, 3]] = 0.5, 0.8, True
    scorer: Any = SimpleNamespace(steps=lambda _: (probs, ends))
    found = ProcessScorer.solutions(scorer, rows, ("min", "prod", "last"))
    np.testing.assert_allclose(found, [[0.5, -np.inf], [0.4, -np.inf], [0.8, -np.inf]], rtol=1e-6)
