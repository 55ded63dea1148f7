"""Trained scorers by name, to choose among a policy's samples and to weigh votes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from jax.sharding import Mesh

from models.axes import batch_ways
from models.config import ModelConfig
from models.transformer import Params
from objectives.prm import StepReduction
from research.algorithms.base import Algorithm, completion_rows
from research.algorithms.prm import StepScorer
from research.core.batch import SequenceBatch
from research.core.errors import ConfigError, WorkdirError
from research.core.network import Network
from research.data.tokenizer import Tokenizer
from research.evals.draws import Values
from research.evals.scaling import vote_weights
from research.rewards.learned import ProcessScorer, RewardScorer

_AT_ONCE = 32
"""Rows that a scorer reads at a time, where the mesh splits them evenly."""

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

    def __call__(self, rows: SequenceBatch) -> np.ndarray:
        """`[len(scores), B]` scores of rows on the host; -inf for a solution without a step."""
        if self.kind == "reward":
            return RewardScorer((self.network,), self.mesh)(rows)[None]
        process = ProcessScorer(self.network, self.mesh, self.tokenizer)
        return process.solutions(rows, self.reductions if self.kind == "process" else ("last",))

    def weights(self, scores: Values) -> Values:
        """Votes of one kind of score, `[P, M]`: a reward's as `vote_weights` says; probabilities as they are."""
        return vote_weights(scores) if self.kind == "reward" else np.where(np.isfinite(scores), scores, 0.0)


class TrainedStage(Protocol):
    """What is read of a finished stage."""

    @property
    def folder(self) -> Path: ...
    @property
    def name(self) -> str: ...
    @property
    def algorithm(self) -> Algorithm: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def max_length(self) -> int:
        """Tokens that the model can read."""

    def read_params(self, mesh: Mesh) -> Params:
        """The newest parameters."""


def make_scorers(
    stages: Sequence[TrainedStage],
    *,
    tokenizer: Tokenizer,
    mesh: Mesh,
    length: int,
    reductions: Sequence[StepReduction],
) -> list[Scorer]:
    """Scorers with the newest parameters of their stages.

    Args:
      stages: of reward models, outcome or process scorers. Those of one name are told apart by their folders' names.
      tokenizer: the policy's.
      mesh: the devices.
      length: of the longest row, tokens.
      reductions: of process scorers.

    Raises:
      ConfigError: a scorer reads another vocabulary, or shorter rows.
      WorkdirError: a stage holds no scorer.
      CheckpointError: it holds no readable checkpoint.
    """
    found = [_scorer(stage, tokenizer, mesh, length, tuple(reductions)) for stage in stages]
    names = [scorer.name for scorer in found]
    return [
        replace(scorer, name=stage.folder.name) if names.count(scorer.name) > 1 else scorer
        for stage, scorer in zip(stages, found, strict=True)
    ]


def _scorer(
    stage: TrainedStage, tokenizer: Tokenizer, mesh: Mesh, length: int, reductions: tuple[StepReduction, ...]
) -> Scorer:
    folder, algorithm = stage.folder, stage.algorithm
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
    return Scorer(stage.name, kind, Network(stage.read_params(mesh), stage.model), tokenizer, mesh, reductions)


Drawn = tuple[np.ndarray, np.ndarray]
"""A completion's token ids [T], and [T] whether the model drew them (or was given them)."""


def score_samples(
    score: Callable[[SequenceBatch], np.ndarray],
    prompts: Sequence[np.ndarray],
    groups: Sequence[Sequence[Drawn]],
    *,
    max_prompt_length: int,
    max_new_tokens: int,
    pad_id: int,
    mesh: Mesh,
) -> Values:
    """Scores of completions; must run inside `jax.set_mesh(mesh)`.

    Args:
      score: from rows of prompt + completion on the host to scores [..., B]; it reads every completion once.
      prompts: P prompts' token ids.
      groups: [P][n] completions; n at least 1.
      max_prompt_length, max_new_tokens: width of the rows, so that few programs are compiled.
      pad_id: fills rows.
      mesh: the devices that the scorer lies on.

    Returns:
      `[..., P, n]`.
    """
    n = len(groups[0])
    flat = [(prompt, sample) for prompt, group in zip(prompts, groups, strict=True) for sample in group]
    ways = batch_ways(mesh)
    at_once = -(-min(len(flat), _AT_ONCE) // ways) * ways
    filled = [*flat, *flat[:1] * (-len(flat) % at_once)]
    parts = []
    for start in range(0, len(filled), at_once):
        chunk = filled[start : start + at_once]
        prompt_tokens = np.full((at_once, max_prompt_length), pad_id, np.int32)
        prompt_mask = np.zeros(prompt_tokens.shape, bool)
        tokens = np.full((at_once, max_new_tokens), pad_id, np.int32)
        drawn, given = np.zeros((2, *tokens.shape), bool)
        for row, (prompt, (ids, own)) in enumerate(chunk):
            prompt_tokens[row, max_prompt_length - len(prompt) :] = prompt
            prompt_mask[row, max_prompt_length - len(prompt) :] = True
            tokens[row, : len(ids)], drawn[row, : len(ids)], given[row, : len(ids)] = ids, own, ~own
        rows = completion_rows(
            prompt_tokens, prompt_mask, tokens, drawn, np.ones(at_once), given, group_size=math.gcd(n, at_once)
        )
        parts.append(score(rows).astype(np.float64))
    scores = np.concatenate(parts, axis=-1)[..., : len(flat)]
    return scores.reshape(*scores.shape[:-1], len(groups), n)
