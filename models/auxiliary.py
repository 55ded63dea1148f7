"""What a model computes beside hidden states."""

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class AuxSums(flax.struct.PyTreeNode):
    """Sums over a batch's real tokens and over layers, which the training step weighs and adds to its loss.

    Sums and counts, so that micro-batches and devices add up before one division. Empty for a dense model: it then adds
    nothing to a compiled program.

    Attributes:
      losses: name to (total, count) of a loss, such as a router's balance or z-loss.
      loads: name to tokens that each expert got.
    """

    losses: Mapping[str, tuple[Float[Array, ""], Float[Array, ""]]] = flax.struct.field(default_factory=dict)
    loads: Mapping[str, Float[Array, " E"]] = flax.struct.field(default_factory=dict)

    def sum_layers(self) -> "AuxSums":
        """Of sums stacked over layers, `[L, ...]`."""
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), self)
