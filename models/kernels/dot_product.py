"""JAX's own attention: cuDNN's flash attention on NVIDIA GPUs, or plain products for any platform, shape and dtype.

Shapes: B batch, T time, H heads, K kv heads, N head_dim.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def refusal(dtype: jnp.dtype, head_dim: int) -> str:
    """Why cuDNN cannot serve; "" where it can."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 and float16, not {dtype}"
    if head_dim % 8 or head_dim > 128:
        return f"head_dim={head_dim} is no multiple of 8 up to 128"
    if jax.default_backend() != "gpu":
        return "its checks ask the GPU's driver while tracing, and there is none here"
    return ""


def attention(
    q_BTHN: Float[Array, "B T H N"],
    k_BTKN: Float[Array, "B T K N"],
    v_BTKN: Float[Array, "B T K N"],
    segment_ids_BT: Int[Array, "B T"],
    *,
    implementation: Literal["cudnn", "xla"],
) -> Float[Array, "B T H N"]:
    """Causal attention within segments, which are a mask: cuDNN takes it as an additive `[B, 1, T, T]` bias."""
    same_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return jax.nn.dot_product_attention(
        q_BTHN, k_BTKN, v_BTKN, mask=same_BTT[:, None], is_causal=True, implementation=implementation
    )
