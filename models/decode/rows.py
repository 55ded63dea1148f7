"""Operations on the rows and slots of a KV cache: insert, select, resize, share a prefix.

Shapes: B batch, R rows to insert, P prefixes of C slots.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from models.decode.cache import KVCache


def with_prefix(cache: KVCache, prefix: KVCache | None) -> KVCache:
    """The cache with the P rows of a filled, unquantised one as prefixes of B/P adjacent rows each."""
    if prefix is None or not prefix.slots:
        return cache
    layers = tuple(
        layer.replace(prefix_keys=shared.keys, prefix_values=shared.values)
        for layer, shared in zip(cache.layers, prefix.layers, strict=True)
    )
    return cache.replace(layers=layers, prefix=prefix.segment_ids > 0)


def take_rows(cache: KVCache, rows: Int[Array, " R"]) -> KVCache:
    """These rows, in this order; the cache has at most one prefix, because a row's index says which is its own."""
    assert cache.prefix is None or len(cache.prefix) == 1
    take = lambda x: jnp.take(x, rows, axis=0)  # noqa: E731
    return cache.map_slots(take, segment_ids=take(cache.segment_ids))


def resize(cache: KVCache, slots: int, *, drop: int | Int[Array, ""] = 0) -> KVCache:
    """The cache without each row's first `drop` slots, padded or cut to `slots`, which hold `length - drop`."""
    kept = min(slots, cache.slots)

    def fit(x: Array, axis: int) -> Array:
        # Padded, so that the slice stays inside whatever is dropped.
        room = [(0, 0)] * x.ndim
        if not isinstance(drop, int):
            room[axis] = (0, kept)
        sizes = [kept if i == axis else size for i, size in enumerate(x.shape)]
        x = jax.lax.dynamic_slice(jnp.pad(x, room), [drop if i == axis else 0 for i in range(x.ndim)], sizes)
        room[axis] = (0, slots - kept)
        return jnp.pad(x, room)

    return cache.map_slots(partial(fit, axis=2), segment_ids=fit(cache.segment_ids, 1), length=cache.length - drop)


def insert_rows(cache: KVCache, filled: KVCache, rows: Int[Array, " R"], sources: Int[Array, " R"]) -> KVCache:
    """Copies rows `sources` of a filled cache to rows `rows`, right-aligned before the next slot; B or more drops one.

    `filled` holds left-padded prompts in all its slots, unquantised; the cache's `length` is at least as large.
    """
    start = cache.length - filled.slots

    def put(x: Array, new: Array, axis: int) -> Array:
        """One scatter of whole windows: in place, and partitioned over a sharded batch."""
        indices = jnp.stack([rows, jnp.full_like(rows, start)], axis=1)
        windows, values = tuple(range(1, x.ndim)), jnp.take(new, sources, axis=0).astype(x.dtype)
        numbers = jax.lax.ScatterDimensionNumbers(windows, (0,), (0, axis))
        mode = jax.lax.GatherScatterMode.FILL_OR_DROP
        return jax.lax.scatter(x, indices, values, numbers, unique_indices=True, mode=mode)

    cleared = cache.segment_ids.at[rows].set(0, mode="drop")
    return cache.replace(
        layers=tuple(
            layer.map_slots(lambda x, new: put(x, new, 2), layer.stored(new.keys, new.values))
            for layer, new in zip(cache.layers, filled.layers, strict=True)
        ),
        segment_ids=put(cleared, filled.segment_ids, 1),
    )
