"""Trained scorers by name, to choose among a policy's samples and to weigh votes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jax.sharding import Mesh

from models.axes import batch_ways
from objectives.prm import StepReduction
from research.algorithms.base import completion_rows
from research.core.batch import SequenceBatch
from research.core.network import Network
from research.data.tokenizer import Tokenizer
from research.evals.draws import Values
from research.rewards.learned import ProcessScorer, RewardScorer

_AT_ONCE = 32
"""Rows that a scorer reads at a time, where the mesh splits them evenly."""

Kind = Literal["reward", "outcome", "process"]


@dataclass(frozen=True)
class Scorer:
    """A reward model, or a scorer of outcomes or steps, by its stage's name.

    `reductions`: from the steps of a solution to its score, one score each; of a process scorer only.
    """

    name: str
    kind: Kind
    network: Network
    tokenizer: Tokenizer
    mesh: Mesh
    reductions: tuple[StepReduction, ...]

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of the scores it gives: the stage's, and of a process scorer each with its reduction."""
        if self.kind == "process":
            return tuple(f"{self.name}-{how}" for how in self.reductions)
        return (self.name,)

    def __call__(self, rows: SequenceBatch) -> np.ndarray:
        """`[len(scores), B]` scores of rows on the host; -inf for a solution without a step."""
        if self.kind == "reward":
            return RewardScorer((self.network,), self.mesh)(rows)[None]
        process = ProcessScorer(self.network, self.mesh, self.tokenizer)
        return process.solutions(rows, self.reductions if self.kind == "process" else ("last",))

    def weights(self, scores: Values) -> Values:
        """Votes of one kind of score, `[P, M]`; a score of -inf never votes. Probabilities vote as they are.

        A Bradley-Terry reward has no zero, so plain sums of it mean nothing: `w_i = exp(r_i - max_j r_j)` over a
        problem's samples. Under the model (Plackett-Luce, Luce 1959) an answer's votes are then proportional to the
        chance that the preferred sample gives it, and no shift of the scores changes them.
        """
        if self.kind != "reward":
            return np.where(np.isfinite(scores), scores, 0.0)
        best = scores.max(axis=1, keepdims=True)
        return np.exp(scores - np.where(np.isfinite(best), best, 0.0))


def score_samples(
    score: Callable[[SequenceBatch], np.ndarray],
    prompts: Sequence[np.ndarray],
    groups: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]],
    *,
    max_prompt_length: int,
    max_new_tokens: int,
    pad_id: int,
    mesh: Mesh,
) -> Values:
    """Scores `[..., P, n]` of completions; must run inside `jax.set_mesh(mesh)`.

    Args:
      score: from rows of prompt + completion on the host to scores [..., B]; it reads every completion once.
      prompts: P prompts' token ids.
      groups: [P][n] completions, n at least 1: token ids [T], and [T] whether the model drew them (or was given them).
      max_prompt_length, max_new_tokens: width of the rows, so that few programs are compiled.
    """
    n = len(groups[0])
    flat = [(prompt, sample) for prompt, group in zip(prompts, groups, strict=True) for sample in group]
    ways = batch_ways(mesh)
    at_once = -(-min(len(flat), _AT_ONCE) // ways) * ways
    filled = [*flat, *flat[:1] * (-len(flat) % at_once)]
    parts = []
    for start in range(0, len(filled), at_once):
        prompt_tokens = np.full((at_once, max_prompt_length), pad_id, np.int32)
        prompt_mask = np.zeros(prompt_tokens.shape, bool)
        tokens = np.full((at_once, max_new_tokens), pad_id, np.int32)
        drawn, given = np.zeros((2, *tokens.shape), bool)
        for row, (prompt, (ids, own)) in enumerate(filled[start : start + at_once]):
            prompt_tokens[row, max_prompt_length - len(prompt) :] = prompt
            prompt_mask[row, max_prompt_length - len(prompt) :] = True
            tokens[row, : len(ids)], drawn[row, : len(ids)], given[row, : len(ids)] = ids, own, ~own
        rows = completion_rows(
            prompt_tokens, prompt_mask, tokens, drawn, np.ones(at_once), given, group_size=math.gcd(n, at_once)
        )
        parts.append(score(rows).astype(np.float64))
    scores = np.concatenate(parts, axis=-1)[..., : len(flat)]
    return scores.reshape(*scores.shape[:-1], len(groups), n)
