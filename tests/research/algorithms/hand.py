"""What the hand-computed losses start from: logits of the whole vocabulary, then NumPy in float64."""

from functools import partial
from typing import Any

import jax
import numpy as np

from models.config import ModelConfig
from models.heads import scorer_outputs
from models.softmax import compute_logits
from models.transformer import forward, unembedding
from research.core.batch import SequenceBatch
from tests.research.algorithms.toy import MODEL


@partial(jax.jit, static_argnums=1)
def _logits(params: Any, model: ModelConfig, rows: SequenceBatch) -> jax.Array:
    hidden, _ = forward(params, model, rows.tokens, rows.positions, rows.segment_ids)
    return compute_logits(hidden, unembedding(params), model)


@partial(jax.jit, static_argnums=1)
def _outputs(params: Any, model: ModelConfig, rows: SequenceBatch) -> jax.Array:
    return scorer_outputs(params, model, rows.tokens, rows.positions, rows.segment_ids)[0]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def log_probs(params: Any, rows: SequenceBatch, model: ModelConfig = MODEL, temperature: float = 1.0) -> np.ndarray:
    """`[B, T, V]` log-probs of what comes *after* each token."""
    return log_softmax(np.asarray(_logits(params, model, rows), np.float64) / temperature)


def token_logps(params: Any, rows: SequenceBatch) -> np.ndarray:
    """`[B, T]` log-prob of each token, predicted from the slot before it."""
    after = log_probs(params, rows)
    found = np.zeros(rows.tokens.shape)
    for b in range(found.shape[0]):
        for t in range(1, found.shape[1]):
            found[b, t] = after[b, t - 1, rows.tokens[b, t]]
    return found


def outputs(params: Any, rows: SequenceBatch) -> np.ndarray:
    """`[B, T, O]` of a scorer."""
    return np.asarray(_outputs(params, MODEL, rows), np.float64)


def sums(params: Any, rows: SequenceBatch) -> np.ndarray:
    """`[B]` log-prob of each row's targets."""
    logps = token_logps(params, rows)
    return np.array([logps[b][np.asarray(rows.loss_mask)[b]].sum() for b in range(len(logps))])


def sigmoid(x: np.ndarray | float) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-np.asarray(x, np.float64)))


def mean(values: np.ndarray, weights: np.ndarray) -> float:
    return float((values * weights).sum() / weights.sum())
