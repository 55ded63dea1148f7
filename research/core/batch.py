"""The kinds of batch that algorithms eat. Every leaf has the batch as its first axis.

Shapes: B rows, T tokens, P prompts, K candidates. Log-probs are in nats.
"""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from models.groups import Group, groups_split


class SequenceBatch(flax.struct.PyTreeNode):
    """Rows of tokens, packed or padded."""

    tokens: Int[Any, "B T"]
    loss_mask: Bool[Any, "B T"]  # True where this token is a target (predicted from those before it)
    segment_ids: Int[Any, "B T"]  # 0 is padding; tokens see only their own segment
    positions: Int[Any, "B T"]  # counted within the segment
    weights: Float[Any, " B"]  # 0 for a row that only fills the batch
    # Static: no slot before it is a target, so none is scored there (the prompts' width).
    first_target: int = flax.struct.field(pytree_node=False, default=0)
    # Static: so many adjacent rows are equal before `first_target`: completions of one prompt.
    group_size: int = flax.struct.field(pytree_node=False, default=1)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str = "") -> "SequenceBatch":
        """Rows of a data pipeline; those that only fill it (no target at all) get weight 0."""
        names = ("tokens", "loss_mask", "segment_ids", "positions")
        found: dict[str, Any] = {name: arrays[f"{prefix}{name}"] for name in names}
        return cls(**found, weights=found["loss_mask"].any(axis=-1).astype(np.float32))

    @property
    def group(self) -> Group | None:
        """What adjacent rows share; None where they share nothing."""
        return Group(self.group_size, self.first_target) if self.group_size > 1 and self.first_target else None

    @property
    def used_mask(self) -> Bool[Array, "B T"]:
        """Targets of the rows that count: a NaN in a row of weight 0 would reach the gradient, as 0 * NaN."""
        return self.loss_mask & (self.weights > 0)[:, None]


class PreferenceBatch(flax.struct.PyTreeNode):
    """Pairs of completions of one prompt."""

    chosen: SequenceBatch  # its weights are the pairs' weights
    rejected: SequenceBatch
    margins: Float[Any, " B"]  # how much better the chosen side is rated; 0 where nobody said
    soft_labels: Float[Any, " B"]  # probability that the chosen side is the better one; 1 where nobody said
    ref_chosen_logps: Float[Any, "B T"] | None = None
    ref_rejected_logps: Float[Any, "B T"] | None = None


class RankingBatch(flax.struct.PyTreeNode):
    """K ranked completions of each prompt."""

    rows: SequenceBatch  # leaves [P, K, T], weights [P, K]: 0 for a candidate that is not there
    ranks: Int[Any, "P K"]  # lower is better


class UnpairedBatch(flax.struct.PyTreeNode):
    """Completions that are each desirable or not, and mismatched ones to measure the KL on."""

    rows: SequenceBatch
    mismatched: SequenceBatch  # the same prompts with another prompt's completion
    desirable: Bool[Any, " B"]
    ref_logps: Float[Any, " B"] | None = None  # of whole sequences
    reference_point: Float[Any, " B"] | None = None  # z of the global batch on every row, nats


class StepBatch(flax.struct.PyTreeNode):
    """Solutions with labelled steps."""

    rows: SequenceBatch  # `loss_mask` is True at the last token of each labelled step
    step_labels: Float[Any, "B T"]  # in [0, 1], the probability that the step is right


class RolloutBatch(flax.struct.PyTreeNode):
    """Sampled completions with their advantages."""

    # Left-padded prompt + right-padded completion; `loss_mask` is True on the drawn tokens that enter the loss: all of
    # `completion_mask`, or nothing of a truncated completion that is masked out.
    sequences: SequenceBatch
    completion_mask: Bool[Any, "B T"]  # True on every drawn token, those of masked-out completions included
    sampler_logps: Float[Any, "B T"]  # under the distribution sampled from
    scores: Float[Any, " B"]  # rewards after shaping
    advantage_scale: Float[Any, " B"]  # difficulty weights of the advantages
    step_rewards: Float[Any, "B T"] | None = None  # paid at the last token of a step; None where no step is paid
    step_mask: Bool[Any, "B T"] | None = None  # the last token of each step; None with `step_rewards`
    advantages: Float[Any, "..."] | None = None  # [B] or [B, T]
    old_logps: Float[Any, "B T"] | None = None  # under the policy before the first update on this batch
    ref_logps: Float[Any, "B T"] | None = None  # under the reference
    values: Float[Any, "B T"] | None = None  # as the returns, of the value model before that update
    returns: Float[Any, "B T"] | None = None

    @property
    def drawn(self) -> SequenceBatch:
        """The rows with every drawn token as a target, also where the completion is masked out of the loss."""
        return self.sequences.replace(loss_mask=self.completion_mask)


class DistillBatch(flax.struct.PyTreeNode):
    """The student's rows and what the teacher sees of the same responses."""

    student: SequenceBatch  # prompt + response; `loss_mask` is the response
    teacher: SequenceBatch  # the same responses, after a longer context where there is one
    teacher_slots: Int[Any, "B T"]  # the teacher's slot of each student token, its own slot where it has none


Batch = SequenceBatch | PreferenceBatch | RankingBatch | UnpairedBatch | StepBatch | RolloutBatch | DistillBatch


def rows_of(batch: Batch) -> list[SequenceBatch]:
    """The rows of tokens that the policy (or scorer) being trained reads."""
    match batch:
        case SequenceBatch():
            return [batch]
        case PreferenceBatch():
            return [batch.chosen, batch.rejected]
        case DistillBatch():
            return [batch.student]
        case RolloutBatch():
            return [batch.sequences]
    return [batch.rows]


def split_batch(batch: Batch, parts: int) -> Any:
    """Leaves `[parts, B / parts, ...]`: part j holds rows j, j + parts ..., so that each device keeps its own rows.

    Where rows share prompts, part j holds groups j, j + parts ...; rows that do not fall into whole groups on every
    device stop sharing.
    """
    [together] = {rows.group_size for rows in rows_of(batch)}
    if together > 1 and not groups_split(rows_of(batch)[0].weights.shape[0] // parts, together):
        together = 1
        batch = jax.tree.map(_alone, batch, is_leaf=lambda node: isinstance(node, SequenceBatch))

    def split(x: Array) -> Array:
        units = x.reshape(x.shape[0] // (parts * together), parts, together, *x.shape[1:])
        return units.swapaxes(0, 1).reshape(parts, -1, *x.shape[1:])

    return jax.tree.map(split, batch)


def _alone(node: Any) -> Any:
    """Rows, each with its own prompt."""
    return node.replace(group_size=1) if isinstance(node, SequenceBatch) else node
