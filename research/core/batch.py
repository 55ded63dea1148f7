"""The kinds of batch that algorithms eat. Every leaf has the batch as its first axis.

Shapes: B rows, T tokens, P prompts, K candidates.
"""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from models.groups import Group, groups_split


class SequenceBatch(flax.struct.PyTreeNode):
    """Rows of tokens, packed or padded.

    Attributes:
      tokens: `[B, T]` int32.
      loss_mask: `[B, T]` bool, True where this token is a target (predicted from those before it).
      segment_ids: `[B, T]` int32, 0 is padding; tokens see only their own segment.
      positions: `[B, T]` int32, counted within the segment.
      weights: `[B]` float32, 0 for a row that only fills the batch.
      first_target: static; no slot before it is a target, so none is scored there (the prompts' width).
      group_size: static; so many adjacent rows are equal before `first_target`: completions of one prompt.
    """

    tokens: Int[Any, "B T"]
    loss_mask: Bool[Any, "B T"]
    segment_ids: Int[Any, "B T"]
    positions: Int[Any, "B T"]
    weights: Float[Any, " B"]
    first_target: int = flax.struct.field(pytree_node=False, default=0)
    group_size: int = flax.struct.field(pytree_node=False, default=1)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str = "") -> "SequenceBatch":
        """Rows of a data pipeline; those that only fill it (no target at all) get weight 0."""
        names = ("tokens", "loss_mask", "segment_ids", "positions")
        found = {name: arrays[f"{prefix}{name}"] for name in names}
        weights = found["loss_mask"].any(axis=-1).astype(np.float32)
        return cls(found["tokens"], found["loss_mask"], found["segment_ids"], found["positions"], weights)

    @property
    def group(self) -> Group | None:
        """What adjacent rows share; None where they share nothing."""
        return Group(self.group_size, self.first_target) if self.group_size > 1 and self.first_target else None

    @property
    def used_mask(self) -> Bool[Array, "B T"]:
        """Targets of the rows that count: a NaN in a row of weight 0 would reach the gradient, as 0 * NaN."""
        return self.loss_mask & (self.weights > 0)[:, None]


class PreferenceBatch(flax.struct.PyTreeNode):
    """Pairs of completions of one prompt.

    Attributes:
      chosen, rejected: rows of the two sides; `chosen.weights` are the pairs' weights.
      margins: `[B]` float32, how much better the chosen side is rated; 0 where nobody said.
      soft_labels: `[B]` float32, probability that the chosen side is the better one; 1 where nobody said.
      ref_chosen_logps, ref_rejected_logps: `[B, T]` token log-probs under the reference, nats.
    """

    chosen: SequenceBatch
    rejected: SequenceBatch
    margins: Float[Any, " B"]
    soft_labels: Float[Any, " B"]
    ref_chosen_logps: Float[Any, "B T"] | None = None
    ref_rejected_logps: Float[Any, "B T"] | None = None


class RankingBatch(flax.struct.PyTreeNode):
    """K ranked completions of each prompt.

    Attributes:
      rows: leaves `[P, K, T]`, weights `[P, K]`: 0 for a candidate that is not there.
      ranks: `[P, K]` int32, lower is better.
    """

    rows: SequenceBatch
    ranks: Int[Any, "P K"]


class UnpairedBatch(flax.struct.PyTreeNode):
    """Completions that are each desirable or not, and mismatched ones to measure the KL on.

    Attributes:
      rows: prompt + completion.
      mismatched: the same prompts with another prompt's completion.
      desirable: `[B]` bool.
      ref_logps: `[B]` sequence log-probs of `rows` under the reference, nats.
      reference_point: `[B]` float32, z of the global batch on every row, nats.
    """

    rows: SequenceBatch
    mismatched: SequenceBatch
    desirable: Bool[Any, " B"]
    ref_logps: Float[Any, " B"] | None = None
    reference_point: Float[Any, " B"] | None = None


class StepBatch(flax.struct.PyTreeNode):
    """Solutions with labelled steps.

    Attributes:
      rows: prompt + solution; `loss_mask` is True at the last token of each labelled step.
      step_labels: `[B, T]` float32 in [0, 1], the probability that the step is right.
    """

    rows: SequenceBatch
    step_labels: Float[Any, "B T"]


class RolloutBatch(flax.struct.PyTreeNode):
    """Sampled completions with their advantages.

    Attributes:
      sequences: left-padded prompt + right-padded completion; `loss_mask` is True on the drawn tokens that enter
        the loss: all of `completion_mask`, or nothing of a truncated completion that is masked out.
      completion_mask: `[B, T]` bool, True on every drawn token, those of masked-out completions included.
      sampler_logps: `[B, T]` float32, nats, under the distribution sampled from.
      scores: `[B]` float32, rewards after shaping.
      advantage_scale: `[B]` float32, difficulty weights of the advantages.
      step_rewards: `[B, T]` float32, paid at the last token of a step; None where no step is paid.
      step_mask: `[B, T]` bool, the last token of each step; None with `step_rewards`.
      advantages: `[B]` or `[B, T]` float32.
      old_logps: `[B, T]` float32, nats, under the policy before the first update on this batch.
      ref_logps: `[B, T]` float32, nats, under the reference.
      values, returns: `[B, T]` float32, of the value model before the first update on this batch.
    """

    sequences: SequenceBatch
    completion_mask: Bool[Any, "B T"]
    sampler_logps: Float[Any, "B T"]
    scores: Float[Any, " B"]
    advantage_scale: Float[Any, " B"]
    step_rewards: Float[Any, "B T"] | None = None
    step_mask: Bool[Any, "B T"] | None = None
    advantages: Float[Any, "..."] | None = None
    old_logps: Float[Any, "B T"] | None = None
    ref_logps: Float[Any, "B T"] | None = None
    values: Float[Any, "B T"] | None = None
    returns: Float[Any, "B T"] | None = None

    @property
    def drawn(self) -> SequenceBatch:
        """The rows with every drawn token as a target, also where the completion is masked out of the loss."""
        return self.sequences.replace(loss_mask=self.completion_mask)


class DistillBatch(flax.struct.PyTreeNode):
    """The student's rows and what the teacher sees of the same responses.

    Attributes:
      student: prompt + response; `loss_mask` is the response.
      teacher: the same responses, after a longer context where there is one.
      teacher_slots: `[B, T]` int32, the teacher's slot of each student token, its own slot where it has none.
    """

    student: SequenceBatch
    teacher: SequenceBatch
    teacher_slots: Int[Any, "B T"]


Batch = SequenceBatch | PreferenceBatch | RankingBatch | UnpairedBatch | StepBatch | RolloutBatch | DistillBatch


def rows_of(batch: Batch) -> list[SequenceBatch]:
    """The rows of tokens that the policy (or scorer) being trained reads."""
    if isinstance(batch, SequenceBatch):
        return [batch]
    if isinstance(batch, PreferenceBatch):
        return [batch.chosen, batch.rejected]
    if isinstance(batch, RankingBatch | StepBatch):
        return [batch.rows]
    if isinstance(batch, UnpairedBatch):
        return [batch.rows]
    if isinstance(batch, DistillBatch):
        return [batch.student]
    return [batch.sequences]


def split_batch(batch: Batch, parts: int) -> Any:
    """Leaves `[parts, B / parts, ...]`: part j holds rows j, j + parts ..., so that each device keeps its own rows.

    Where rows share prompts, part j holds groups j, j + parts ...; rows that do not fall into whole groups on every
    device stop sharing.
    """
    [together] = {rows.group_size for rows in rows_of(batch)}
    if together > 1:
        B = rows_of(batch)[0].weights.shape[0]
        if not groups_split(B // parts, together):
            together = 1
            batch = _ungrouped(batch)

    def split(x: Array) -> Array:
        units = x.reshape(x.shape[0] // (parts * together), parts, together, *x.shape[1:])
        return units.swapaxes(0, 1).reshape(parts, -1, *x.shape[1:])

    return jax.tree.map(split, batch)


def _ungrouped(batch: Batch) -> Batch:
    """The same rows, each with its own prompt."""
    is_rows = lambda x: isinstance(x, SequenceBatch)  # noqa: E731
    alone = lambda x: x.replace(group_size=1) if is_rows(x) else x  # noqa: E731
    found: Batch = jax.tree.map(alone, batch, is_leaf=is_rows)
    return found
