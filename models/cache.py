"""The KV cache: an explicit pytree, laid out for the attention product and written in place.

Shapes: B batch, T new tokens, R rows to insert, K kv heads, S slots, P prefixes of C slots, N head_dim, L layers. Keys
and values are `[B, K, S, N]`, so that the products over slots are batched matrix products without a transpose; layers
are separate arrays, because a stacked cache would be copied whole at every decode step.

All rows write at one slot, the same for all, so that a write is one slice update; which slots of a row hold its
tokens is said by `segment_ids`, and they need not be adjacent. A row that enters late is written to the slots
just before the next one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.attention import HIDDEN
from models.axes import constrain
from models.config import ModelConfig
from models.products import einsum_float32

_AXES = ("batch", "activation_kv_heads", "length", "head_dim")


class LayerCache(flax.struct.PyTreeNode):
    """Keys and values of one layer.

    Attributes:
      keys, values: in the compute dtype, or int8; a single row may be kept without its batch axis (`KVCache.squeezed`).
      key_scales, value_scales: of an int8 cache, `[B, K, S]` float32: the largest magnitude of each head's vector
        in a slot, divided by 127. None where the cache is not quantized.
      prefix_keys, prefix_values: `[P, K, C, N]`, of tokens that adjacent B/P rows share and see before their own; or
        None.
    """

    keys: Float[Array, "B K S N"]
    values: Float[Array, "B K S N"]
    key_scales: Float[Array, "B K S"] | None = None
    value_scales: Float[Array, "B K S"] | None = None
    prefix_keys: Float[Array, "P K C N"] | None = None
    prefix_values: Float[Array, "P K C N"] | None = None

    def write(
        self, keys: Float[Array, "B T K N"], values: Float[Array, "B T K N"], at: Int[Array, ""]
    ) -> "LayerCache":
        """Writes T new slots starting at slot `at`."""
        heads = self.keys.shape[:-2]  # B and K, or K alone

        def put(x: Array, new: Array) -> Array:
            start: tuple[Any, ...] = (0,) * len(heads) + (at, 0)
            return jax.lax.dynamic_update_slice(x, new.reshape(*heads, *new.shape[2:]), start[: x.ndim])

        return self.map_slots(put, self.stored(keys.swapaxes(1, 2), values.swapaxes(1, 2)))

    def attend(self, q_BTHN: Float[Array, "B T H N"], reach: "Reach") -> Float[Array, "B T H N"]:
        """Attention of T queries to what they reach of the shared prefix and of their own row; float32 softmax.

        The scales of an int8 cache multiply scores and weights, which are fewer than keys and values.
        """
        B, T, H, N = q_BTHN.shape
        (K, S), compute = self.keys.shape[-3:-1], q_BTHN.dtype
        q_BKRN = (q_BTHN * N**-0.5).reshape(B, T, K, H // K, N).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, N)
        keys, values = (x.reshape(B, K, S, N).astype(compute) for x in (self.keys, self.values))
        scores = einsum_float32("bksn,bkrn->bksr", keys, q_BKRN).swapaxes(2, 3).reshape(B, K, H // K, T, S)
        if self.key_scales is not None:
            scores = scores * self.key_scales.reshape(B, K, 1, 1, S)
        scores = jnp.where(reach.mask_BTS[:, None, None, :, :], scores, HIDDEN)
        top = jnp.max(scores, axis=-1, keepdims=True)
        if self.prefix_keys is not None:
            assert reach.prefix_PC is not None
            P, C = reach.prefix_PC.shape
            shared = einsum_float32("pkrn,pkcn->pkrc", _by_prefix(q_BKRN, P), self.prefix_keys)
            shared = jnp.where(reach.prefix_PC[:, None, None, :], shared, HIDDEN)
            shared = _by_row(shared, B).reshape(B, K, H // K, T, C)
            top = jnp.maximum(top, jnp.max(shared, axis=-1, keepdims=True))
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if self.value_scales is not None:
            weights = weights * self.value_scales.reshape(B, K, 1, 1, S)
        out = einsum_float32("bkrs,bksn->bkrn", weights.astype(compute).reshape(B, K, -1, S), values)
        if self.prefix_values is not None:
            weights = jnp.exp(shared - top)
            total = total + jnp.sum(weights, axis=-1, keepdims=True)
            weights_PKRC = _by_prefix(weights.astype(compute).reshape(B, K, -1, C), P)
            out = out + _by_row(einsum_float32("pkrc,pkcn->pkrn", weights_PKRC, self.prefix_values), B)
        out = (out.reshape(B, K, H // K, T, N) / total).astype(compute)
        return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, N)

    def map_slots(self, fn: Callable[..., Array], *others: "LayerCache") -> "LayerCache":
        """`fn(array, *others' arrays)` on each array that has rows and slots; the prefix has none."""
        names = ["keys", "values"] + ["key_scales", "value_scales"] * (self.key_scales is not None)
        return self.replace(
            **{name: fn(getattr(self, name), *(getattr(other, name) for other in others)) for name in names}
        )

    def stored(self, keys: Float[Array, "B K T N"], values: Float[Array, "B K T N"]) -> "LayerCache":
        """Keys and values as this cache keeps them."""
        if self.key_scales is None:
            return LayerCache(keys.astype(self.keys.dtype), values.astype(self.values.dtype))
        (keys, key_scales), (values, value_scales) = quantize(keys), quantize(values)
        return LayerCache(keys, values, key_scales, value_scales)


def _by_prefix(x_BKRX: Array, P: int) -> Array:
    """`[P, K, B / P * R, X]`: the queries of all rows that share a prefix, beside each other."""
    B, K, R, X = x_BKRX.shape
    return x_BKRX.reshape(P, B // P, K, R, X).swapaxes(1, 2).reshape(P, K, -1, X)


def _by_row(x_PKRX: Array, B: int) -> Array:
    """Undoes `_by_prefix`."""
    P, K, R, X = x_PKRX.shape
    return x_PKRX.reshape(P, K, B // P, R * P // B, X).swapaxes(1, 2).reshape(B, K, -1, X)


class Reach(NamedTuple):
    """Where the newest tokens go in a cache and what they see there; the same for all layers."""

    write_at: Int[Array, ""]
    mask_BTS: Bool[Array, "B T S"]
    prefix_PC: Bool[Array, "P C"] | None


class KVCache(flax.struct.PyTreeNode):
    """All layers' keys and values and which slots hold a real token.

    Attributes:
      layers: one LayerCache per layer.
      segment_ids: `[B, S]` int32, 0 where a slot is empty or holds nothing of this row.
      length: int32 scalar, the next slot to write, the same for every row.
      prefix: `[P, C]`, which slots of the layers' prefixes hold a real token; None without any.
    """

    layers: tuple[LayerCache, ...]
    segment_ids: Int[Array, "B S"]
    length: Int[Array, ""]
    prefix: Bool[Array, "P C"] | None = None

    @property
    def slots(self) -> int:
        """S, the tokens that a row has room for."""
        return self.segment_ids.shape[1]

    def mask(self, num_queries: int, segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T S"]:
        """Which slots each of the `num_queries` newest tokens may attend to, once they are written."""
        slot = jnp.arange(self.slots)
        query = self.length + jnp.arange(num_queries)
        causal = slot[None, :] <= query[:, None]
        same = segment_ids[:, :, None] == self.segment_ids[:, None, :]
        return causal[None] & same

    def squeezed(self) -> "KVCache":
        """One row's keys and values without the batch axis; the same cache if there are more rows.

        What a loop carries should have no axis of size one: XLA's CPU backend drops it for the product, takes the
        result for another array, and copies the cache at every step. `write` and `attend` take both.
        """
        return self._reshaped(lambda x: x[0])

    def unsqueezed(self) -> "KVCache":
        """Undoes `squeezed`."""
        return self._reshaped(lambda x: x[None])

    def _reshaped(self, fn: Callable[[Array], Array]) -> "KVCache":
        if len(self.segment_ids) != 1:
            return self
        return self.replace(layers=tuple(layer.map_slots(fn) for layer in self.layers))


def quantize(x: Float[Array, "B K T N"]) -> tuple[Int[Array, "B K T N"], Float[Array, "B K T"]]:
    """int8 with one scale a vector: the error of an entry is at most half of its vector's scale."""
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


def with_prefix(cache: KVCache, prefix: KVCache | None) -> KVCache:
    """The cache with the tokens of P rows of a filled one, not quantized, each before those of B/P adjacent rows."""
    if prefix is None or not prefix.slots:
        return cache
    layers = tuple(
        layer.replace(prefix_keys=shared.keys, prefix_values=shared.values)
        for layer, shared in zip(cache.layers, prefix.layers, strict=True)
    )
    return cache.replace(layers=layers, prefix=prefix.segment_ids > 0)


def take_rows(cache: KVCache, rows: Int[Array, " R"]) -> KVCache:
    """Only these rows, in this order; of a cache with one prefix at most: a row's place says which is its own."""
    assert cache.prefix is None or len(cache.prefix) == 1
    take = lambda x: jnp.take(x, rows, axis=0)  # noqa: E731
    layers = tuple(layer.map_slots(take) for layer in cache.layers)
    return cache.replace(layers=layers, segment_ids=take(cache.segment_ids))


def resize(cache: KVCache, slots: int, *, drop: int | Int[Array, ""] = 0) -> KVCache:
    """The first `drop` slots left out of every row, and room for `slots` in all: a cache grows by buckets.

    The `length - drop` slots that are left must fit.
    """
    kept = min(slots, cache.slots)

    def fit(x: Array, axis: int) -> Array:
        # Behind the rows there is room to slice from, whatever is dropped.
        room = [(0, 0)] * x.ndim
        if not isinstance(drop, int):
            room[axis] = (0, kept)
        sizes = [kept if i == axis else size for i, size in enumerate(x.shape)]
        x = jax.lax.dynamic_slice(jnp.pad(x, room), [drop if i == axis else 0 for i in range(x.ndim)], sizes)
        room[axis] = (0, slots - kept)
        return jnp.pad(x, room)

    return cache.replace(
        layers=tuple(layer.map_slots(lambda x: fit(x, 2)) for layer in cache.layers),
        segment_ids=fit(cache.segment_ids, 1),
        length=cache.length - drop,
    )


def insert_rows(
    cache: KVCache, filled: KVCache, rows: Int[Array, " R"], sources: Int[Array, " R"]
) -> KVCache:
    """Rows `sources` of a filled cache become rows `rows`, their last token in the slot before the next one.

    Args:
      cache: its `length` is at least the filled one's number of slots.
      filled: prompts, padded on the left, in all its slots; not quantized.
      rows: where they go; a number of B or more goes nowhere.
      sources: which rows of `filled`.
    """
    width = filled.slots
    start = cache.length - width

    def put(x: Array, new: Array, axis: int) -> Array:
        """One scatter of whole windows: in place, and split over a sharded batch."""
        indices = jnp.stack([rows, jnp.full_like(rows, start)], axis=1)
        windows = tuple(range(1, x.ndim))
        numbers = jax.lax.ScatterDimensionNumbers(
            update_window_dims=windows, inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, axis)
        )
        return jax.lax.scatter(
            x,
            indices,
            jnp.take(new, sources, axis=0).astype(x.dtype),
            numbers,
            unique_indices=True,
            mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
        )

    cleared = cache.segment_ids.at[rows].set(0, mode="drop")
    return cache.replace(
        layers=tuple(
            layer.map_slots(lambda x, new: put(x, new, 2), layer.stored(new.keys, new.values))
            for layer, new in zip(cache.layers, filled.layers, strict=True)
        ),
        segment_ids=put(cleared, filled.segment_ids, 1),
    )
