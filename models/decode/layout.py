"""The layout of weights for sampling: fused projections, layers apart, in a small dtype.

Shapes: D model, H heads, K kv heads, G = H/K, N head_dim, F feed-forward.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from models.axes import constrain
from models.config import ModelConfig
from models.kernels.dispatch import target_platform
from models.transformer import Params, unembedding, unstack_layers

Quantize = Callable[[Float[Array, "..."], tuple[int, ...]], tuple[Int[Array, "..."], Float[Array, "..."]]]
"""From a matrix and its output axes to int8 values and one float32 scale for each output."""


def decode_params(
    params: Params, config: ModelConfig, *, dtype: DTypeLike | None = None, quantize: Quantize | None = None
) -> Params:
    """The same model laid out for sampling; done once per update of the policy.

    On a mesh the matrices are gathered over the batch's axes and stay sharded over `tensor`. In each layer,
    `attention` holds `wqkv` `[D, K, G + 2, N]` (per kv head its queries, key and value, so that it is sharded as heads
    are) and `wo` `[H, N, D]`; `mlp` holds `gate_up` `[D, 2, F]` and `down` `[F, D]`. On a CPU a tied model gets its own
    `unembed`. Parameters that are laid out already are returned unchanged.

    Args:
      params: as trained.
      config: of the model; products run in its compute dtype.
      dtype: of the stored matrices; None is the compute dtype.
      quantize: int8 quantisation of the layers' matrices; adds `wqkv_scale` `[K, G + 2, N]`, one scale for each
        output, and so on. Embedding and LM head stay unquantised, in `dtype`.
    """
    if isinstance(params["layers"], tuple) and "wqkv" in params["layers"][0]["attention"]:
        return params
    params, kept = unstack_layers(params, config), jnp.dtype(dtype or config.compute_dtype)
    found = {
        "embed": constrain(params["embed"].astype(kept), "vocab", None),
        "final_norm": params["final_norm"],
        "layers": tuple(_fused(layer, config, kept, quantize) for layer in params["layers"]),
    }
    # A CPU transposes a tied LM head at every call; accelerators read it as it lies.
    if not config.tie_embeddings or target_platform() == "cpu":
        found["unembed"] = constrain(unembedding(params).astype(kept), None, "vocab")
    return found


def _fused(layer: Params, config: ModelConfig, kept: jnp.dtype, quantize: Quantize | None) -> Params:
    attention, mlp = layer["attention"], layer["mlp"]
    D, K, N = config.d_model, config.num_kv_heads, config.head_dim
    wq_DKGN = attention["wq"].reshape(D, K, config.num_heads // K, N)
    wk_DK1N, wv_DK1N = attention["wk"][:, :, None, :], attention["wv"][:, :, None, :]
    wqkv = jnp.concatenate([wq_DKGN, wk_DK1N, wv_DK1N], axis=2)
    gate_up = jnp.stack([mlp["gate"], mlp["up"]], axis=1)

    def keep(name: str, w: jax.Array, *axes: str | None, inputs: int = 1) -> Params:
        """A matrix, with its scales if it is quantised; its first `inputs` axes are summed over."""
        if quantize is None:
            return {name: constrain(w.astype(kept), *axes)}
        values, scales = quantize(w, tuple(range(inputs, w.ndim)))
        return {name: constrain(values, *axes), f"{name}_scale": constrain(scales, *axes[inputs:])}

    qkv = keep("wqkv", wqkv, None, "kv_heads", None, "head_dim")
    out = keep("wo", attention["wo"], "heads", "head_dim", None, inputs=2)
    up, down = keep("gate_up", gate_up, None, None, "mlp"), keep("down", mlp["down"], "mlp", None)
    return {**layer, "attention": qkv | out, "mlp": up | down}
