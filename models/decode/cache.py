"""The KV cache: a pytree laid out for attention's products and updated in place.

Shapes: B batch, T new tokens, K kv heads, S slots, P prefixes of C slots, N head_dim, L layers. Keys and values are
`[B, K, S, N]`, so that the products over slots need no transpose; layers are separate arrays, because a stacked cache
would be copied whole at every decode step.

All rows write to the same slot, so a write is one slice update. `segment_ids` marks the slots that hold a row's
tokens; they need not be adjacent. A row admitted late is written to the slots just before the next one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.axes import constrain
from models.config import ModelConfig

_AXES = ("batch", "activation_kv_heads", "length", "head_dim")


class LayerCache(flax.struct.PyTreeNode):
    """Keys and values of one layer, in the compute dtype or int8.

    A single row may be kept without its batch axis (`KVCache.squeezed`). The scales are those of an int8 cache: the
    largest magnitude of each head's vector in a slot, over 127. B/P adjacent rows share a prefix, if there is one.
    """

    keys: Float[Array, "B K S N"]
    values: Float[Array, "B K S N"]
    key_scales: Float[Array, "B K S"] | None = None
    value_scales: Float[Array, "B K S"] | None = None
    prefix_keys: Float[Array, "P K C N"] | None = None
    prefix_values: Float[Array, "P K C N"] | None = None

    def write(self, keys: Float[Array, "B T K N"], values: Float[Array, "B T K N"], at: Int[Array, ""]) -> "LayerCache":
        """Writes T new slots starting at slot `at`."""
        heads = self.keys.shape[:-2]  # B and K, or K alone

        def put(x: Array, new: Array) -> Array:
            start: tuple[Any, ...] = (0,) * len(heads) + (at, 0)
            return jax.lax.dynamic_update_slice(x, new.reshape(*heads, *new.shape[2:]), start[: x.ndim])

        return self.map_slots(put, self.stored(keys.swapaxes(1, 2), values.swapaxes(1, 2)))

    def map_slots(self, fn: Callable[..., Array], *others: "LayerCache") -> "LayerCache":
        """`fn(array, *others' arrays)` on each array that has rows and slots; the prefix has none."""
        names = ["keys", "values"] + ["key_scales", "value_scales"] * (self.key_scales is not None)
        return self.replace(
            **{name: fn(getattr(self, name), *(getattr(other, name) for other in others)) for name in names}
        )

    def stored(self, keys: Float[Array, "B K T N"], values: Float[Array, "B K T N"]) -> "LayerCache":
        """Keys and values in this cache's dtype, quantised if it is int8."""
        if self.key_scales is None:
            return LayerCache(keys.astype(self.keys.dtype), values.astype(self.values.dtype))
        (keys, key_scales), (values, value_scales) = quantize(keys), quantize(values)
        return LayerCache(keys, values, key_scales, value_scales)


class Reach(NamedTuple):
    """Where new tokens are written in a cache and which slots they attend to; the same for all layers."""

    write_at: Int[Array, ""]
    mask_BTS: Bool[Array, "B T S"]
    prefix_PC: Bool[Array, "P C"] | None


class KVCache(flax.struct.PyTreeNode):
    """All layers' keys and values and which slots hold a real token."""

    layers: tuple[LayerCache, ...]
    segment_ids: Int[Array, "B S"]  # 0 where a slot holds no token of this row
    length: Int[Array, ""]  # the next slot to write, the same for every row
    prefix: Bool[Array, "P C"] | None = None  # which slots of the layers' prefixes hold a real token

    @property
    def slots(self) -> int:
        """S, the capacity of a row in tokens."""
        return self.segment_ids.shape[1]

    def append(self, segment_ids: Int[Array, "B T"]) -> tuple["KVCache", "Reach"]:
        """The cache with T more slots, whose layers are still to be written, and where and what they attend to."""
        T = segment_ids.shape[1]
        seen = jax.lax.dynamic_update_slice(self.segment_ids, segment_ids, (0, self.length))
        causal_TS = jnp.arange(self.slots)[None, :] <= (self.length + jnp.arange(T))[:, None]
        same_BTS = segment_ids[:, :, None] == seen[:, None, :]
        reach = Reach(self.length, causal_TS[None] & same_BTS, self.prefix)
        return self.replace(segment_ids=seen, length=self.length + T), reach

    def squeezed(self) -> "KVCache":
        """One row's keys and values without the batch axis; the same cache if there are more rows.

        For what a loop carries: XLA's CPU backend drops an axis of size one for the product, and then copies the
        cache at every step. `write` and `cached_attention` take both forms.
        """
        return self.map_slots(lambda x: x[0]) if len(self.segment_ids) == 1 else self

    def unsqueezed(self) -> "KVCache":
        """Undoes `squeezed`."""
        return self.map_slots(lambda x: x[None]) if len(self.segment_ids) == 1 else self

    def map_slots(self, fn: Callable[[Array], Array], **changes: Array) -> "KVCache":
        """`fn` on each array of the layers that has rows and slots, with other fields."""
        return self.replace(layers=tuple(layer.map_slots(fn) for layer in self.layers), **changes)


def quantize(x: Float[Array, "B K T N"]) -> tuple[Int[Array, "B K T N"], Float[Array, "B K T"]]:
    """int8 with one scale for each vector; the error of an entry is at most half of it."""
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1) / 127.0
    steps = x / jnp.where(scales > 0, scales, 1.0)[..., None]
    return jnp.round(steps).astype(jnp.int8), scales


def init_cache(config: ModelConfig, batch: int, slots: int, *, int8: bool = False) -> KVCache:
    """An empty cache of `slots` tokens for `batch` rows, in the compute dtype or in int8."""
    shape = (batch, config.num_kv_heads, slots, config.head_dim)
    zeros = jnp.zeros(shape, jnp.int8 if int8 else jnp.dtype(config.compute_dtype))
    zeros = constrain(zeros, *_AXES)
    scales = constrain(jnp.zeros(shape[:3], jnp.float32), *_AXES[:3]) if int8 else None
    layers = tuple(LayerCache(zeros, zeros, scales, scales) for _ in range(config.num_layers))
    return KVCache(layers, jnp.zeros((batch, slots), jnp.int32), jnp.int32(0))
