"""Parameters laid out for decoding: one product gives queries, keys and values, one both halves of the gated block.

Shapes: D model, H heads, K kv heads, G = H/K, N head_dim, F feed-forward, V vocabulary.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from models.axes import constrain
from models.config import ModelConfig
from models.kernels.products import transposes_slowly
from models.transformer import Params, unembedding, unstack_layers

Quantize = Callable[[Float[Array, "..."], tuple[int, ...]], tuple[Int[Array, "..."], Float[Array, "..."]]]
"""From a matrix and the axes of its outputs to int8 values and a float32 scale of each output."""


def decode_params(
    params: Params,
    config: ModelConfig,
    *,
    dtype: DTypeLike | None = None,
    quantize: Quantize | None = None,
) -> Params:
    """The same model as the sampler runs it: matrices in a small dtype, projections fused, layers apart.

    Done once per update of the policy. On a mesh the matrices are gathered over the axes that split the batch and
    stay split over `tensor`. Of each layer, `attention` holds `wqkv` `[D, K, G + 2, N]` (of each kv head its
    queries, its key, its value: it splits as the heads do) and `wo` `[H, N, D]`; `mlp` holds `gate_up` `[D, 2, F]`
    and `down` `[F, D]`. Parameters that are laid out already are returned as they are.

    Args:
      params: as trained.
      config: of the model; the products run in its compute dtype, whatever the matrices are kept in.
      dtype: what the matrices are kept in; None is the compute dtype.
      quantize: of each matrix in a layer, from its trained values; beside `wqkv` there is then `wqkv_scale`
        `[K, G + 2, N]`, one scale of each output, and so on. The embedding and the read-out are look-ups and
        logits, where an error is not averaged over a layer: they stay in `dtype`, tied or not. On a CPU a tied model
        has an `unembed` of its own too.
    """
    if isinstance(params["layers"], tuple) and "wqkv" in params["layers"][0]["attention"]:
        return params
    params, kept = unstack_layers(params, config), jnp.dtype(dtype or config.compute_dtype)
    found = {
        "embed": constrain(params["embed"].astype(kept), "vocab", None),
        "final_norm": params["final_norm"],
        "layers": tuple(_fused(layer, config, kept, quantize) for layer in params["layers"]),
    }
    if not config.tie_embeddings or transposes_slowly():
        found["unembed"] = constrain(unembedding(params).astype(kept), None, "vocab")
    return found


def _fused(layer: Params, config: ModelConfig, kept: jnp.dtype, quantize: Quantize | None) -> Params:
    attention, mlp = layer["attention"], layer["mlp"]
    D, K, N = config.d_model, config.num_kv_heads, config.head_dim
    wq_DKGN = attention["wq"].reshape(D, K, config.num_heads // K, N)
    wk_DK1N, wv_DK1N = attention["wk"][:, :, None, :], attention["wv"][:, :, None, :]
    wqkv = jnp.concatenate([wq_DKGN, wk_DK1N, wv_DK1N], axis=2)
    gate_up = jnp.stack([mlp["gate"], mlp["up"]], axis=1)
    keep = partial(_kept, dtype=kept, quantize=quantize)
    return {
        **layer,
        "attention": {
            **keep("wqkv", wqkv, (None, "kv_heads", None, "head_dim")),
            **keep("wo", attention["wo"], ("heads", "head_dim", None), inputs=2),
        },
        "mlp": {
            **keep("gate_up", gate_up, (None, None, "mlp")),
            **keep("down", mlp["down"], ("mlp", None)),
        },
    }


def _kept(
    name: str,
    w: jax.Array,
    axes: tuple[str | None, ...],
    *,
    inputs: int = 1,
    dtype: jnp.dtype,
    quantize: Quantize | None,
) -> Params:
    """A matrix under its name, and its scales if it has any; its first `inputs` axes are summed over."""
    if quantize is None:
        return {name: constrain(w.astype(dtype), *axes)}
    values, scales = quantize(w, tuple(range(inputs, w.ndim)))
    return {name: constrain(values, *axes), f"{name}_scale": constrain(scales, *axes[inputs:])}
