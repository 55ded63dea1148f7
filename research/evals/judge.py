"""Learned scorers at work in a run: reward models that pay samples, process reward models that judge steps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from objectives.bradley_terry import EnsembleReduction
from objectives.prm import solution_scores
from research.core.batch import SequenceBatch
from research.core.mesh import to_device
from research.core.network import Network
from research.data.steps import step_end_mask
from research.data.tokenizer import Tokenizer
from research.rewards.learned import ensemble_rows, step_probabilities
from research.train.session import StageRun

Judge = Callable[[SequenceBatch], np.ndarray]
"""Rows of prompt + completion on the host -> `[B]` float32 scores."""


def make_judge(run: StageRun) -> Judge:
    """What picks the best of a problem's samples: the stage's reward models, or its process reward model.

    `min` and `prod` favour solutions of few steps, where a scorer is unsure of all: `last` does not.
    """
    if run.stage.final_answer == "reward":
        return RewardJudge(run)
    steps = StepJudge(run)

    def of_steps(rows: SequenceBatch) -> np.ndarray:
        probs, ends = steps(rows)
        scores = solution_scores(
            step_probs=jnp.asarray(probs), step_mask=jnp.asarray(ends), reduction=run.stage.prm_score
        )
        return np.where(ends.any(axis=1), np.asarray(scores), -np.inf)

    return of_steps


class RewardJudge:
    """The stage's reward models, reduced as its config says."""

    def __init__(self, run: StageRun) -> None:
        """Loads them."""
        self.networks = tuple(run.result_of(name).network for name in run.stage.roles.reward)
        self.mesh, self.how = run.mesh, run.stage.reward

    def __call__(self, rows: SequenceBatch) -> np.ndarray:
        """`[B]` scores."""
        coef, device_rows = np.float32(self.how.variance_coef), to_device(self.mesh, rows)
        found = _reward_scores(self.networks, device_rows, coef, reduction=self.how.ensemble)
        return np.asarray(jax.device_get(found), np.float32)


class StepJudge:
    """The stage's process reward model. Steps are lines of what the policy drew: a result in the middle ends none."""

    def __init__(self, run: StageRun) -> None:
        """Loads it."""
        self.network: Network = run.result_of(run.stage.roles.prm).network
        self.mesh: Any = run.mesh
        self.tokenizer: Tokenizer = run.sources.tokenizer

    def __call__(self, rows: SequenceBatch) -> tuple[np.ndarray, np.ndarray]:
        """`[B, T]` probabilities that a step is right, and the mask of the steps' last tokens."""
        ends = step_end_mask(rows.tokens, self.tokenizer, rows.loss_mask)
        device_rows, device_ends = to_device(self.mesh, (rows, ends))
        probs = _step_probabilities(self.network, device_rows, device_ends)
        return np.asarray(jax.device_get(probs), np.float32), ends


@partial(jax.jit, static_argnames="reduction")
def _reward_scores(
    networks: tuple[Network, ...], rows: SequenceBatch, variance_coef: Array, *, reduction: EnsembleReduction
) -> Array:
    coef = variance_coef if reduction == "mean_minus_variance" else 0.0
    return ensemble_rows(networks, rows, reduction=reduction, variance_coef=coef)


@jax.jit
def _step_probabilities(network: Network, rows: SequenceBatch, ends: Array) -> Array:
    return step_probabilities(network.params, network.config, rows, ends)
