"""Scores from trained models: one reward model, an ensemble of them, a process reward model.

Rows are prompt + completion, padded on any side, one sequence a row. The functions are pure and jittable; the classes
take rows on the host, and hold what a run loads once.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from models.heads import last_token_scores
from objectives.bradley_terry import EnsembleReduction, ensemble_score
from objectives.numerics import masked
from objectives.prm import StepReduction, solution_scores
from objectives.types import Scalar
from research.core.batch import SequenceBatch
from research.core.mesh import to_device
from research.core.network import Network, row_outputs
from research.data.steps import step_end_mask
from research.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class RewardScorer:
    """Reward models on a mesh; several are an ensemble, reduced as `ensemble_rows` says."""

    networks: tuple[Network, ...]
    mesh: Mesh
    reduction: EnsembleReduction = "mean"
    variance_coef: float = 0.0

    def __call__(self, rows: SequenceBatch) -> np.ndarray:
        """`[B]` float32 scores of rows on the host."""
        coef = np.float32(self.variance_coef)
        found = ensemble_rows(self.networks, to_device(self.mesh, rows), coef, reduction=self.reduction)
        return np.asarray(jax.device_get(found), np.float32)


@dataclass(frozen=True)
class ProcessScorer:
    """A process reward model on a mesh. Steps are lines of what the policy drew: a tool's result ends none."""

    network: Network
    mesh: Mesh
    tokenizer: Tokenizer

    def steps(self, rows: SequenceBatch) -> tuple[np.ndarray, np.ndarray]:
        """`[B, T]` float32 probabilities that a step is right, at its last token, else 0; and where steps end."""
        ends = step_end_mask(rows.tokens, self.tokenizer, rows.loss_mask)
        found = step_probabilities(self.network, *to_device(self.mesh, (rows, ends)))
        return np.asarray(jax.device_get(found), np.float32), ends

    def solutions(self, rows: SequenceBatch, reductions: tuple[StepReduction, ...]) -> np.ndarray:
        """`[R, B]` float32: of each reduction the score of each solution; -inf for a solution without a step.

        `min` and `prod` favour solutions of few steps where the model is unsure of all; `last` does not.
        """
        probs, ends = map(jnp.asarray, self.steps(rows))
        found = [solution_scores(step_probs=probs, step_mask=ends, reduction=how) for how in reductions]
        return np.where(ends.any(axis=1), np.asarray(found, np.float32), np.float32(-np.inf))


def score_rows(network: Network, rows: SequenceBatch) -> Float[Array, " B"]:
    """A reward model's score of each row, read at its last real token; params are {trunk, head} with one output."""
    return last_token_scores(row_outputs(network, rows)[:, :, 0], rows.segment_ids > 0)


@partial(jax.jit, static_argnames="reduction")
def ensemble_rows(
    networks: tuple[Network, ...], rows: SequenceBatch, variance_coef: Scalar, *, reduction: EnsembleReduction
) -> Float[Array, " B"]:
    """One reward from E >= 1 reward models, which may differ in size but share a tokenizer.

    `reduction` is mean, min (worst case) or mean_minus_variance, which alone reads `variance_coef` >= 0.
    """
    scores = jnp.stack([score_rows(network, rows) for network in networks])
    coef = variance_coef if reduction == "mean_minus_variance" else 0.0
    return ensemble_score(scores=scores, reduction=reduction, variance_coef=coef)


@jax.jit
def step_probabilities(network: Network, rows: SequenceBatch, ends: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Probability that each step is right, at the step's last token (`ends`); 0 elsewhere.

    The network's params are {trunk, head} with two outputs: wrong, right.
    """
    logits = row_outputs(network, rows)
    return masked(jax.nn.sigmoid(masked(logits[:, :, 1] - logits[:, :, 0], ends)), ends)
