"""The three kinds of batch that algorithms eat. Every leaf has the batch as its first axis.

Shapes: B rows, T tokens.
"""

from typing import Any

import flax.struct
from jaxtyping import Bool, Float, Int


class SequenceBatch(flax.struct.PyTreeNode):
    """Rows of tokens, packed or padded.

    Attributes:
      tokens: `[B, T]` int32.
      loss_mask: `[B, T]` bool, True where this token is a target (predicted from those before it).
      segment_ids: `[B, T]` int32, 0 is padding; tokens see only their own segment.
      positions: `[B, T]` int32, counted within the segment.
      weights: `[B]` float32, 0 for a row that only fills the batch.
    """

    tokens: Int[Any, "B T"]
    loss_mask: Bool[Any, "B T"]
    segment_ids: Int[Any, "B T"]
    positions: Int[Any, "B T"]
    weights: Float[Any, " B"]


class PreferenceBatch(flax.struct.PyTreeNode):
    """Pairs of completions of one prompt.

    Attributes:
      chosen, rejected: rows of the two sides; `chosen.weights` are the pairs' weights.
      ref_chosen_logps, ref_rejected_logps: `[B]` sequence log-probs under the reference, nats.
    """

    chosen: SequenceBatch
    rejected: SequenceBatch
    ref_chosen_logps: Float[Any, " B"]
    ref_rejected_logps: Float[Any, " B"]


class RolloutBatch(flax.struct.PyTreeNode):
    """Sampled completions with their advantages.

    Attributes:
      sequences: left-padded prompt + right-padded completion; `loss_mask` is the completion mask.
      advantages: `[B]` float32.
      old_logps: `[B, T]` float32, nats, under the policy that sampled.
      ref_logps: `[B, T]` float32, nats, under the reference; zeros where the algorithm needs none.
    """

    sequences: SequenceBatch
    advantages: Float[Any, " B"]
    old_logps: Float[Any, "B T"]
    ref_logps: Float[Any, "B T"]


Batch = SequenceBatch | PreferenceBatch | RolloutBatch
