"""A decoder-only transformer: tokens in, hidden states out; logits only through `models.logprobs`.

Shapes: B batch, T time, D model, V vocabulary, L layers, N head_dim.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.axes import constrain
from models.config import ModelConfig
from models.decode.cache import KVCache, LayerCache
from models.groups import Group, fold, groups_split, unfold
from models.layers import AuxSums, Block, RMSNorm, rope_tables, scaled_normal

Params = Any  # the tree under `params`: {embed, layers (stacked on a leading L), final_norm, unembed if untied}

_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Transformer(nn.Module):
    """Embedding, L pre-norm blocks with parameters stacked on a leading axis, final norm."""

    config: ModelConfig
    group: Group | None = None  # each row is a folded group, and B counts groups

    @nn.compact
    def __call__(
        self, tokens_BT: Int[Array, "B T"], positions_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], AuxSums]:
        """Hidden states after the final norm, in the compute dtype, and auxiliary sums.

        Args:
          tokens_BT: int32 token ids.
          positions_BT: int32 rotary positions, counted within each segment.
          segment_ids_BT: int32; tokens see only earlier tokens of the same segment; 0 is padding.
        """
        c = self.config
        stored = jnp.dtype(c.param_dtype)
        init = scaled_normal(0.02, "vocab", "embed")
        embed_VD: Any = self.param("embed", init, (c.vocab_size, c.d_model), stored)
        if not c.tie_embeddings:
            init = scaled_normal(c.d_model**-0.5, "embed", "vocab")
            self.param("unembed", init, (c.d_model, c.vocab_size), stored)
        x_BTD = embed(embed_VD, tokens_BT, c)
        remat = {} if c.remat == "none" else {"policy": _POLICIES[c.remat], "prevent_cse": not c.scan_layers}
        layers = nn.scan(
            nn.remat(Block, **remat) if remat else Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=c.num_layers,
            unroll=1 if c.scan_layers else c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.group, name="layers")
        rope = rope_tables(positions_BT, c.rope_theta, c.head_dim)
        x_BTD, (aux, _) = layers(x_BTD, rope, segment_ids_BT)
        return RMSNorm(c, name="final_norm")(x_BTD), aux.sum_layers()


def embed(embed_VD: Float[Array, "V D"], tokens_BT: Int[Array, "B T"], config: ModelConfig) -> Float[Array, "B T D"]:
    """The embedding of each token, in the compute dtype."""
    # Gathered over fsdp before the look-up, as every other weight is before its product: the batch is
    # split over the same axis, and the partitioner would otherwise replicate the result.
    table_VD = constrain(embed_VD.astype(jnp.dtype(config.compute_dtype)), "vocab", "activation_embed")
    return constrain(jnp.take(table_VD, tokens_BT, axis=0), "batch", "length", "activation_embed")


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
) -> tuple[Float[Array, "B T D"], AuxSums]:
    """Hidden states of a whole batch, without a cache, and auxiliary sums for the training step.

    Args:
      params, config: of the model; layers stacked, or laid out for sampling.
      tokens_BT, positions_BT, segment_ids_BT: int32, as `Transformer` takes them.
      group: groups of adjacent rows that share a prompt, which is then computed once for all of them.
    """
    rows: tuple[Array, ...] = (tokens_BT, positions_BT, segment_ids_BT)
    if group is not None and not groups_split(len(tokens_BT), group.size):
        group = None
    if group is not None:
        rows = tuple(fold(x, group) for x in rows)
    if isinstance(params["layers"], tuple):
        hidden_BTD, aux, _ = _apply_blocks(params, config, *rows, group=group)
    else:
        out: Any = Transformer(config, group).apply({"params": params}, *rows)
        hidden_BTD, aux = out
    return hidden_BTD if group is None else unfold(hidden_BTD, group), aux


def forward_cached(
    params: Params,
    config: ModelConfig,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    cache: KVCache,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Appends T tokens to the cache, which has room for them; they attend to all that it holds.

    The rest is as `forward` takes it. Layers are unrolled, so that each one's cache is updated in place.
    """
    hidden_BTD, _, written = _apply_blocks(params, config, tokens_BT, positions_BT, segment_ids_BT, cache=cache)
    return hidden_BTD, written


def unembedding(params: Params) -> Float[Array, "D V"]:
    """The read-out matrix; the embedding's, where the model has none of its own."""
    return params["unembed"] if "unembed" in params else params["embed"].T


def unstack_layers(params: Params, config: ModelConfig) -> Params:
    """The same parameters with `layers` as a tuple of L trees: done once before a decode loop."""
    if isinstance(params["layers"], tuple):
        return params
    L = config.num_layers
    leaves, treedef = jax.tree.flatten(params["layers"])
    # `lax.split` transposes to one concatenation, L slices would to L pads.
    rows = [jax.lax.split(leaf, (1,) * L, axis=0) for leaf in leaves]
    return {**params, "layers": tuple(jax.tree.unflatten(treedef, [row[i][0] for row in rows]) for i in range(L))}


def _apply_blocks(
    params: Params,
    c: ModelConfig,
    tokens_BT: Array,
    positions_BT: Array,
    segment_ids_BT: Array,
    *,
    cache: KVCache | None = None,
    group: Group | None = None,
) -> tuple[Array, AuxSums, Any]:
    """The same model layer by layer, with parameters of each layer apart and, if there is one, a cache."""
    x_BTD = embed(params["embed"], tokens_BT, c)
    rope = rope_tables(positions_BT, c.rope_theta, c.head_dim)
    caches: tuple[LayerCache | None, ...] = (None,) * c.num_layers
    reach = None
    if cache is not None:
        cache, reach = cache.append(segment_ids_BT)
        caches = cache.layers
    sums: list[AuxSums] = []
    written: list[LayerCache | None] = []
    for weights, layer_cache in zip(unstack_layers(params, c)["layers"], caches, strict=True):
        out: Any = Block(c, group).apply({"params": weights}, x_BTD, rope, segment_ids_BT, layer_cache, reach)
        x_BTD, (aux, layer_cache) = out
        sums.append(aux)
        written.append(layer_cache)
    hidden_BTD: Any = RMSNorm(c).apply({"params": params["final_norm"]}, x_BTD)
    aux = jax.tree.map(lambda *x: sum(x), *sums)
    return hidden_BTD, aux, None if cache is None else cache.replace(layers=tuple(written))
