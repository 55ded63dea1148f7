"""What an algorithm is: a small frozen dataclass between the model and an objective.

An algorithm says which data it learns from and whether it needs a frozen reference, computes log-probs
through the one shared function, and calls its objective. It holds only what is static; its numbers arrive
traced, in a dict, at every call.
"""

from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import Array, Float

from models.config import ModelConfig
from models.logprobs import TokenLogps, token_logps
from models.transformer import Params
from objectives.types import WeightedSum
from research.batch import Batch, SequenceBatch

DataKind = Literal["text", "chat", "preferences", "rollouts"]
"""Where batches come from: raw text, chat examples, preference pairs, or the policy's own samples."""

Scalars = dict[str, Float[Any, ""]]


class Rollouts(NamedTuple):
    """One iteration's samples on the host, rows laid out [p1, p1, ..., p2, p2]; B = P * group_size.

    Attributes:
      prompt_tokens: `[B, L]` int32, left-padded.
      prompt_mask: `[B, L]` bool.
      tokens: `[B, N]` int32 completions.
      mask: `[B, N]` bool, True up to and with the stop token.
      sampler_logps: `[B, N]` float32, nats, under the distribution sampled from.
      stopped: `[B]` bool, False where the completion was cut at its limit.
      rewards: `[B]` float32.
      prompt_ids: `[B]` int32.
      group_size: G.
    """

    prompt_tokens: np.ndarray
    prompt_mask: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray
    sampler_logps: np.ndarray
    stopped: np.ndarray
    rewards: np.ndarray
    prompt_ids: np.ndarray
    group_size: int

    @property
    def lengths(self) -> np.ndarray:
        """`[B]` tokens in each completion, the stop token included."""
        return self.mask.sum(axis=1)


class Algorithm(Protocol):
    """The interface of `research/algorithms/*.py`; implementations are frozen, hashable dataclasses."""

    @property
    def data(self) -> DataKind:
        """Where the batches come from."""

    @property
    def needs_reference(self) -> bool:
        """Whether `with_reference` must run on each batch, with frozen parameters."""

    def loss(
        self, params: Params, config: ModelConfig, batch: Batch, scalars: Scalars
    ) -> tuple[WeightedSum, dict[str, WeightedSum]]:
        """Total and count of the loss, and of each metric."""

    def with_reference(self, params: Params, config: ModelConfig, batch: Batch, scalars: Scalars) -> Batch:
        """The batch with the reference's log-probs filled in."""

    def from_rollouts(self, rollouts: Rollouts, seed: int) -> tuple[Batch, dict[str, float]]:
        """On the host: samples to a training batch of fixed shape, and metrics about the choice.

        `seed` is unique to the iteration. A batch whose weights are all zero means: nothing to learn from.
        """


def batch_logps(
    params: Params, config: ModelConfig, rows: SequenceBatch, temperature: float | Array = 1.0
) -> TokenLogps:
    """Teacher-forced log-probs of a SequenceBatch."""
    return token_logps(params, config, rows.tokens, rows.positions, rows.segment_ids, temperature=temperature)


def sequence_rows(rollouts: Rollouts, rows: np.ndarray, weights: np.ndarray) -> SequenceBatch:
    """The chosen rollouts as prompt + completion rows; positions and masks come from lengths."""
    tokens = np.concatenate([rollouts.prompt_tokens[rows], rollouts.tokens[rows]], axis=1)
    real = np.concatenate([rollouts.prompt_mask[rows], rollouts.mask[rows]], axis=1)
    loss_mask = np.concatenate([np.zeros_like(rollouts.prompt_mask[rows]), rollouts.mask[rows]], axis=1)
    return SequenceBatch(
        tokens=tokens.astype(np.int32),
        loss_mask=loss_mask,
        segment_ids=real.astype(np.int32),
        positions=np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32),
        weights=weights.astype(np.float32),
    )


def after_prompt(values: np.ndarray, prompt_length: int) -> np.ndarray:
    """Per-completion-token values `[B, N]` aligned with prompt + completion rows `[B, L + N]`."""
    return np.pad(values, ((0, 0), (prompt_length, 0))).astype(np.float32)
