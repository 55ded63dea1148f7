"""A model with its parameters, and what is read off a model's rows: log-probs, hidden states, a scorer's outputs.

The auxiliary sums that models return beside them are empty, since every model is dense.
"""

import flax.struct
from jaxtyping import Array, Float

from models.config import ModelConfig
from models.heads import scorer_outputs
from models.logprobs import token_logps
from models.softmax import TokenLogps
from models.transformer import Params, forward
from research.core.batch import SequenceBatch


class Network(flax.struct.PyTreeNode):
    """A model and its parameters.

    Attributes:
      params: in the layout of its role: a policy's, or a scorer's {trunk, head}.
      config: static model description.
    """

    params: Params
    config: ModelConfig = flax.struct.field(pytree_node=False)


def batch_logps(
    network: Network, rows: SequenceBatch, temperature: float | Array = 1.0, *, all_targets: bool = False
) -> TokenLogps:
    """Teacher-forced log-probs of a SequenceBatch's targets; 0 elsewhere.

    Where (nearly) `all_targets` of the rows count, it costs more to look for the others than to score them.
    """
    scored, _ = token_logps(
        network.params,
        network.config,
        rows.tokens,
        rows.positions,
        rows.segment_ids,
        temperature=temperature,
        first=rows.first_target,
        needed_BT=None if all_targets else rows.loss_mask,
        group=rows.group,
    )
    return scored


def row_states(network: Network, rows: SequenceBatch) -> Float[Array, "B T D"]:
    """Hidden states after reading each token of a SequenceBatch."""
    return forward(network.params, network.config, rows.tokens, rows.positions, rows.segment_ids, group=rows.group)[0]


def row_outputs(scorer: Network, rows: SequenceBatch) -> Float[Array, "B T O"]:
    """A scorer's outputs after reading each token of a SequenceBatch."""
    places = (rows.tokens, rows.positions, rows.segment_ids)
    return scorer_outputs(scorer.params, scorer.config, *places, group=rows.group)[0]
