"""Trained scorers read back from their stages' folders, to choose among a policy's samples."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from objectives.prm import StepReduction, solution_scores
from research.algorithms.prm import StepScorer
from research.core.batch import SequenceBatch
from research.core.errors import ConfigError, WorkdirError
from research.core.mesh import to_device
from research.core.network import Network
from research.data.steps import step_end_mask
from research.data.tokenizer import Tokenizer
from research.evals.draws import Values
from research.evals.scaling import vote_weights
from research.rewards.learned import score_rows, step_probabilities
from research.train.chain import load_stage

Kind = Literal["reward", "outcome", "process"]


@dataclass(frozen=True)
class Scorer:
    """A reward model, or a scorer of outcomes or steps.

    Attributes:
      name: of its stage.
      kind: what it was trained on: pairs, solutions or steps.
      network: its newest parameters.
      tokenizer: the one it was trained with.
      mesh: the devices.
      reductions: from the steps of a solution to its score, one score each; of a process scorer only.
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

    def __call__(self, rows: SequenceBatch, *, at_once: int) -> Values:
        """`[len(scores), B]` scores of rows on the host; -inf for a solution without a step.

        Args:
          rows: prompt + completion.
          at_once: rows read at a time; B is a multiple of it.
        """
        B = len(rows.tokens)
        parts = [
            self._score(jax.tree.map(lambda x: x[start : start + at_once], rows))  # noqa: B023 - called at once
            for start in range(0, B, at_once)
        ]
        return np.concatenate(parts, axis=1).astype(np.float64)

    def weights(self, scores: Values) -> Values:
        """Votes of one kind of score, `[P, M]`: a reward's as `vote_weights` says; probabilities as they are."""
        return vote_weights(scores) if self.kind == "reward" else np.where(np.isfinite(scores), scores, 0.0)

    def _score(self, rows: SequenceBatch) -> np.ndarray:
        if self.kind == "reward":
            return np.asarray(jax.device_get(_rewards(self.network, to_device(self.mesh, rows))))[None]
        ends = step_end_mask(rows.tokens, self.tokenizer, rows.loss_mask)
        how: tuple[StepReduction, ...] = self.reductions if self.kind == "process" else ("last",)
        device_rows, device_ends = to_device(self.mesh, (rows, ends))
        found = _solutions(self.network, device_rows, device_ends, reductions=how)
        return np.where(ends.any(axis=1), np.asarray(jax.device_get(found)), -np.inf)


@jax.jit
def _rewards(network: Network, rows: SequenceBatch) -> Array:
    return score_rows(network.params, network.config, rows)


@partial(jax.jit, static_argnames="reductions")
def _solutions(
    network: Network, rows: SequenceBatch, ends: Array, *, reductions: tuple[StepReduction, ...]
) -> Array:
    probs = step_probabilities(network.params, network.config, rows, ends)
    return jnp.stack([solution_scores(step_probs=probs, step_mask=ends, reduction=how) for how in reductions])


def load_scorers(
    folders: Sequence[Path],
    *,
    tokenizer: Tokenizer,
    mesh: Mesh,
    length: int,
    reductions: Sequence[StepReduction],
) -> list[Scorer]:
    """Loads the newest parameters of scorers' stages.

    Args:
      folders: <workdir>/stages/<name>-<hash>. Stages of one name are told apart by their folders' names.
      tokenizer: the policy's.
      mesh: the devices.
      length: of the longest row, tokens.
      reductions: of process scorers.

    Raises:
      ConfigError: a scorer reads another vocabulary, or shorter rows.
      WorkdirError: a folder is not a stage's, or holds no scorer.
      CheckpointError: it holds no readable checkpoint.
    """
    found = [_load(folder, tokenizer, mesh, length, tuple(reductions)) for folder in folders]
    names = [scorer.name for scorer in found]
    return [
        replace(scorer, name=folder.name) if names.count(scorer.name) > 1 else scorer
        for folder, scorer in zip(folders, found, strict=True)
    ]


def _load(
    folder: Path, tokenizer: Tokenizer, mesh: Mesh, length: int, reductions: tuple[StepReduction, ...]
) -> Scorer:
    stage = load_stage(folder)
    algorithm = stage.algorithm
    if algorithm.layout not in ("scorer", "step_scorer"):
        raise WorkdirError(
            f"{folder}: holds a {algorithm.layout}, expected a reward model, an outcome scorer or a process scorer"
        )
    if stage.tokenizer.model != tokenizer.model:
        raise ConfigError(f"{folder}: has another tokenizer than the policy, expected the same for both")
    if length > stage.max_length:
        raise ConfigError(
            f"{folder}: reads at most {stage.max_length} tokens, expected {length}: prompt and completion"
        )
    kind: Kind = algorithm.supervision if isinstance(algorithm, StepScorer) else "reward"
    return Scorer(stage.name, kind, Network(stage.params(mesh), stage.model), tokenizer, mesh, reductions)
