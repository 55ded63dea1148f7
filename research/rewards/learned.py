"""Rewards from learned scorers: one reward model, an ensemble of them, a process reward model.

All are pure and jittable; rows are prompt + completion, padded on any side, one sequence a row. What they need
to know of the completion is its mask: nothing here looks at token ids.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from models.config import ModelConfig
from models.heads import last_token_scores
from models.transformer import Params
from objectives.bradley_terry import EnsembleReduction, ensemble_score
from objectives.numerics import masked
from objectives.types import Scalar
from research.core.batch import SequenceBatch
from research.core.network import Network, row_outputs


def score_rows(params: Params, config: ModelConfig, rows: SequenceBatch) -> Float[Array, " B"]:
    """A reward model's score of each row, read at its last real token.

    Args:
      params: {trunk, head} with one output.
      config: of the trunk.
      rows: prompt + completion, one sequence a row.
    """
    outputs = row_outputs(params, config, rows)
    return last_token_scores(outputs[:, :, 0], rows.segment_ids > 0)


def ensemble_rows(
    networks: tuple[Network, ...],
    rows: SequenceBatch,
    *,
    reduction: EnsembleReduction = "mean",
    variance_coef: Scalar = 0.0,
) -> Float[Array, " B"]:
    """One reward from E reward models, which may differ in size but share a tokenizer.

    Args:
      networks: E scorers.
      rows: prompt + completion.
      reduction: mean, min (worst case) or mean_minus_variance.
      variance_coef: >= 0, only for mean_minus_variance.

    Raises:
      ValueError: no network, an unknown reduction, or a coefficient without effect.
    """
    if not networks:
        raise ValueError("networks: got none, expected at least one reward model")
    scores = jnp.stack([score_rows(network.params, network.config, rows) for network in networks])
    return ensemble_score(scores=scores, reduction=reduction, variance_coef=variance_coef)


def step_logits(params: Params, config: ModelConfig, rows: SequenceBatch) -> Float[Array, "B T 2"]:
    """A process reward model's logits (wrong, right) after reading each token."""
    return row_outputs(params, config, rows)


def step_probabilities(
    params: Params, config: ModelConfig, rows: SequenceBatch, step_mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Probability that each step is right, at the step's last token; 0 elsewhere.

    Args:
      params: {trunk, head} with two outputs.
      config: of the trunk.
      rows: prompt + solution, one sequence a row.
      step_mask: True at the last token of each step.

    Returns:
      `[B, T]`, for `objectives.prm.solution_scores` and `step_reward_tokens`.
    """
    logits = step_logits(params, config, rows)
    return masked(jax.nn.sigmoid(masked(logits[:, :, 1] - logits[:, :, 0], step_mask)), step_mask)
