"""Best of N: a scorer's scores of the samples of one prompt.

Shapes: S samples, L prompt tokens, N completion slots.
"""

from collections.abc import Sequence

import numpy as np

from models.axes import batch_ways
from research.algorithms.base import completion_rows
from research.evals.draws import Values
from research.evals.scorers import Scorer
from research.sampling.rows import Row

_AT_ONCE = 32
"""Rows that a scorer reads at a time, at most, where the mesh splits them evenly."""


def sample_scores(
    scorer: Scorer, prompt: np.ndarray, samples: Sequence[Row], *, max_new_tokens: int, pad_id: int
) -> Values:
    """`[S]` the scorer's first score of each sample, as it was drawn; -inf for a solution without a step.

    What was given to the model (a tool's result) is read as context: no step ends in it.

    Args:
      scorer: reads them; must run inside `jax.set_mesh(scorer.mesh)`.
      prompt: `[L]` tokens.
      samples: S at least 1.
      max_new_tokens: N.
      pad_id: fills rows.
    """
    ways = batch_ways(scorer.mesh)
    at_once = -(-min(len(samples), _AT_ONCE) // ways) * ways
    count = -(-len(samples) // at_once) * at_once
    filled = [*samples, *list(samples[:1]) * (count - len(samples))]
    tokens = np.full((count, max_new_tokens), pad_id, np.int32)
    real, drawn = np.zeros((2, count, max_new_tokens), bool)
    for i, row in enumerate(filled):
        tokens[i, : row.length], real[i, : row.length] = row.tokens[: row.length], True
        drawn[i, : row.length] = row.mask[: row.length]
    prompts = np.tile(prompt, (count, 1))
    everywhere = np.ones_like(prompts, bool)
    rows = completion_rows(prompts, everywhere, tokens, real, np.ones(count), group_size=at_once)
    rows = rows.replace(loss_mask=np.concatenate([np.zeros_like(prompts, bool), drawn], axis=1))
    return scorer(rows, at_once=at_once)[0, : len(samples)]
