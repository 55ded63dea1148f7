"""A frozen model, and what is read off a model's rows: log-probs, hidden states, a scorer's outputs."""

import flax.struct
from jaxtyping import Array, Float

from models.config import ModelConfig
from models.heads import scorer_outputs
from models.logprobs import token_logps
from models.softmax import TokenLogps
from models.transformer import Params, forward
from research.core.batch import SequenceBatch


class Network(flax.struct.PyTreeNode):
    """A frozen model; its parameters are in the layout of its role: a policy's, or a scorer's {trunk, head}."""

    params: Params
    config: ModelConfig = flax.struct.field(pytree_node=False)


def batch_logps(
    params: Params,
    config: ModelConfig,
    rows: SequenceBatch,
    temperature: float | Array = 1.0,
    *,
    all_targets: bool = False,
) -> TokenLogps:
    """Teacher-forced log-probs of a SequenceBatch's targets; 0 elsewhere.

    Where (nearly) `all_targets` of the rows count, it costs more to look for the others than to score them.
    """
    needed = None if all_targets else rows.loss_mask
    return token_logps(
        params,
        config,
        rows.tokens,
        rows.positions,
        rows.segment_ids,
        temperature=temperature,
        first=rows.first_target,
        needed_BT=needed,
        group=rows.group,
    )[0]


def row_states(params: Params, config: ModelConfig, rows: SequenceBatch) -> Float[Array, "B T D"]:
    """Hidden states after reading each token; the auxiliary sums are empty, since every model is dense."""
    return forward(params, config, rows.tokens, rows.positions, rows.segment_ids, group=rows.group)[0]


def row_outputs(scorer: Params, config: ModelConfig, rows: SequenceBatch) -> Float[Array, "B T O"]:
    """A scorer's outputs after reading each token."""
    return scorer_outputs(scorer, config, rows.tokens, rows.positions, rows.segment_ids, group=rows.group)[0]
