"""A decoder-only transformer: tokens in, hidden states out; logits only through `models.logprobs`.

Shapes: B batch, T time, S key slots, D model, V vocabulary, L layers.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.axes import constrain
from models.cache import KVCache, Reach
from models.config import ModelConfig
from models.groups import Group, fold, groups_split, unfold
from models.layers import Block, RMSNorm, rope_tables, scaled_normal

Params = Any
"""The tree under `params`: {embed, layers (stacked on a leading L), final_norm, unembed if untied}."""

_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Transformer(nn.Module):
    """Embedding, L pre-norm blocks with parameters stacked on a leading axis, final norm."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        cache: KVCache | None = None,
        group: Group | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Hidden states after the final norm, float32-normalised, in the compute dtype.

        Args:
          tokens_BT: int32 token ids.
          positions_BT: int32 rotary positions, counted within each segment.
          segment_ids_BT: int32; tokens see only earlier tokens of the same segment; 0 is padding.
          cache: with a cache, the T tokens are appended to it and attend to all that it holds.
          group: with a group, each row is a folded one (`models.groups`), and B counts groups; not with a cache.

        Returns:
          Hidden states and the updated cache (None where none was given).
        """
        c = self.config
        stored, compute = jnp.dtype(c.param_dtype), jnp.dtype(c.compute_dtype)
        init = scaled_normal(0.02, "vocab", "embed")
        embed_VD = self.param("embed", init, (c.vocab_size, c.d_model), stored)
        if not c.tie_embeddings:
            init = scaled_normal(c.d_model**-0.5, "embed", "vocab")
            self.param("unembed", init, (c.d_model, c.vocab_size), stored)
        if self.is_initializing():
            layers = self.param("layers", _init_layers, c)
        else:
            layers = self.get_variable("params", "layers")

        # Gathered over fsdp before the look-up, as every other weight is before its product: the batch is
        # split over the same axis, and the partitioner would otherwise replicate the result.
        table_VD = constrain(embed_VD.astype(compute), "vocab", "activation_embed")
        x_BTD = jnp.take(table_VD, tokens_BT, axis=0)
        x_BTD = constrain(x_BTD, "batch", "length", "activation_embed")
        rope = rope_tables(positions_BT, c)
        if cache is None:
            x_BTD = _run_layers(c, layers, x_BTD, rope, segment_ids_BT, group)
        else:
            x_BTD, cache = _run_cached(c, layers, x_BTD, rope, segment_ids_BT, cache)
        return RMSNorm(c, name="final_norm")(x_BTD), cache


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Parameters boxed with their logical axis names (`flax.linen.meta.unbox` strips them)."""
    dummy = jnp.zeros((1, 2), jnp.int32)
    return Transformer(config).init(key, dummy, dummy, dummy)["params"]


def forward(
    params: Params,
    config: ModelConfig,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    *,
    group: Group | None = None,
) -> Float[Array, "B T D"]:
    """Hidden states of a whole batch, without a cache.

    Args:
      params, config: of the model.
      tokens_BT, positions_BT, segment_ids_BT: as `Transformer` takes them.
      group: groups of adjacent rows that share a prompt, which is then computed once for all of them.
    """
    rows = (tokens_BT, positions_BT, segment_ids_BT)
    if group is None or not groups_split(len(tokens_BT), group.size):
        return Transformer(config).apply({"params": params}, *rows)[0]
    folded = (fold(x, group) for x in rows)
    return unfold(Transformer(config).apply({"params": params}, *folded, group=group)[0], group)


def forward_cached(
    params: Params,
    config: ModelConfig,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    cache: KVCache,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Appends T tokens to the cache; layers are unrolled so that each cache is updated in place."""
    out: Any = Transformer(config).apply({"params": params}, tokens_BT, positions_BT, segment_ids_BT, cache)
    return out


def unembedding(params: Params) -> Float[Array, "D V"]:
    """The read-out matrix; the embedding's, where the model has none of its own."""
    return params["unembed"] if "unembed" in params else params["embed"].T


def unstack_layers(params: Params, config: ModelConfig) -> Params:
    """The same parameters with `layers` as a tuple of L trees: done once before a decode loop."""
    if isinstance(params["layers"], tuple):
        return params
    return {**params, "layers": _unstack(params["layers"], config.num_layers)}


def _init_layers(key: jax.Array, c: ModelConfig) -> Params:
    """L blocks' parameters stacked on a leading axis named `layers`."""
    x = jnp.zeros((1, 2, c.d_model), jnp.dtype(c.compute_dtype))
    ids = jnp.ones((1, 2), jnp.int32)

    def one(key: jax.Array) -> Params:
        return Block(c).init(key, x, rope_tables(ids, c), ids)["params"]

    boxed = jax.vmap(one)(jax.random.split(key, c.num_layers))
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda box: box.add_axis(0, {nn.PARTITION_NAME: "layers"}), boxed, is_leaf=is_box)


def _unstack(stacked: Params, num_layers: int) -> tuple[Params, ...]:
    """Splits the leading axis; `lax.split` transposes to one concatenation, L slices would to L pads."""
    leaves, treedef = jax.tree.flatten(stacked)
    rows = [jax.lax.split(leaf, (1,) * num_layers, axis=0) for leaf in leaves]
    return tuple(jax.tree.unflatten(treedef, [row[i][0] for row in rows]) for i in range(num_layers))


def _run_layers(
    c: ModelConfig,
    layers: Params,
    x_BTD: Array,
    rope: tuple[Array, Array],
    segment_ids_BT: Array,
    group: Group | None,
) -> Array:
    def block(x: Array, layer: Params) -> Array:
        return Block(c, parent=None).apply({"params": layer}, x, rope, segment_ids_BT, group=group)[0]

    if c.remat != "none":
        block = jax.checkpoint(block, policy=_POLICIES[c.remat], prevent_cse=not c.scan_layers)
    if c.scan_layers and not isinstance(layers, tuple):
        return jax.lax.scan(lambda x, layer: (block(x, layer), None), x_BTD, layers)[0]
    for layer in layers if isinstance(layers, tuple) else _unstack(layers, c.num_layers):
        x_BTD = block(x_BTD, layer)
    return x_BTD


def _run_cached(
    c: ModelConfig,
    layers: Params,
    x_BTD: Array,
    rope: tuple[Array, Array],
    segment_ids_BT: Array,
    cache: KVCache,
) -> tuple[Array, KVCache]:
    T = x_BTD.shape[1]
    seen = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids_BT, (0, cache.length))
    cache = cache.replace(segment_ids=seen)
    reach = Reach(cache.length, cache.mask(T, segment_ids_BT), cache.prefix)
    written = []
    unstacked = layers if isinstance(layers, tuple) else _unstack(layers, c.num_layers)
    for layer, layer_cache in zip(unstacked, cache.layers, strict=True):
        out: Any = Block(c, parent=None).apply(
            {"params": layer}, x_BTD, rope, segment_ids_BT, layer_cache, reach
        )
        x_BTD = out[0]
        written.append(out[1])
    return x_BTD, cache.replace(layers=tuple(written), length=cache.length + T)
