"""The KV cache: an explicit pytree, laid out for the attention product and written in place.

Shapes: B batch, K kv heads, S slots, N head_dim, L layers. Keys and values are `[B, K, S, N]`, so that the
products over slots are batched matrix products without a transpose; layers are separate arrays, because a
stacked cache would be copied whole at every decode step.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.attention import grouped_attention
from models.axes import constrain
from models.config import ModelConfig


class LayerCache(flax.struct.PyTreeNode):
    """Keys and values of one layer."""

    keys: Float[Array, "B K S N"]
    values: Float[Array, "B K S N"]

    def write(
        self, keys: Float[Array, "B T K N"], values: Float[Array, "B T K N"], at: Int[Array, ""]
    ) -> "LayerCache":
        """Writes T new slots starting at slot `at`."""
        start, keys, values = (0, 0, at, 0), keys.swapaxes(1, 2), values.swapaxes(1, 2)
        return LayerCache(
            jax.lax.dynamic_update_slice(self.keys, keys.astype(self.keys.dtype), start),
            jax.lax.dynamic_update_slice(self.values, values.astype(self.values.dtype), start),
        )

    def attend(
        self, q_BTHN: Float[Array, "B T H N"], mask_BTS: Bool[Array, "B T S"]
    ) -> Float[Array, "B T H N"]:
        """Attention of T queries to all slots that the mask names."""
        return grouped_attention(q_BTHN, self.keys, self.values, mask_BTS)


class Reach(NamedTuple):
    """Where the newest tokens go in a cache and what they see there; the same for all layers."""

    write_at: Int[Array, ""]
    mask_BTS: Bool[Array, "B T S"]


class KVCache(flax.struct.PyTreeNode):
    """All layers' keys and values and which slots hold a real token.

    Attributes:
      layers: one LayerCache per layer.
      segment_ids: `[B, S]` int32, 0 where a slot is empty or holds padding.
      length: int32 scalar, number of slots written (the same for every row: rows are left-padded).
    """

    layers: tuple[LayerCache, ...]
    segment_ids: Int[Array, "B S"]
    length: Int[Array, ""]

    def mask(self, num_queries: int, segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T S"]:
        """Which slots each of the `num_queries` newest tokens may attend to, once they are written."""
        slot = jnp.arange(self.segment_ids.shape[1])
        query = self.length + jnp.arange(num_queries)
        causal = slot[None, :] <= query[:, None]
        same = segment_ids[:, :, None] == self.segment_ids[:, None, :]
        return causal[None] & same


def init_cache(config: ModelConfig, batch: int, slots: int) -> KVCache:
    """An empty cache of `slots` tokens for `batch` rows, in the compute dtype."""
    shape = (batch, config.num_kv_heads, slots, config.head_dim)
    zeros = jnp.zeros(shape, jnp.dtype(config.compute_dtype))
    zeros = constrain(zeros, "batch", "activation_kv_heads", "length", "head_dim")
    layers = tuple(LayerCache(zeros, zeros) for _ in range(config.num_layers))
    return KVCache(layers, jnp.zeros((batch, slots), jnp.int32), jnp.int32(0))


def repeat_rows(cache: KVCache, times: int) -> KVCache:
    """Each row `times` over, adjacent: one prefill of a prompt serves its whole group."""
    if times == 1:
        return cache
    layers, segment_ids = jax.tree.map(
        lambda x: jnp.repeat(x, times, axis=0), (cache.layers, cache.segment_ids)
    )
    return KVCache(layers, segment_ids, cache.length)
