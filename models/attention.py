"""Attention over rows of segments, behind one function, and over a cache.

Shapes: B batch, T query time, S key slots, H heads, K kv heads, G = H/K query heads a kv head, N head_dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.config import ModelConfig


def self_attention(
    q_BTHN: Float[Array, "B T H N"],
    k_BTKN: Float[Array, "B T K N"],
    v_BTKN: Float[Array, "B T K N"],
    segment_ids_BT: Int[Array, "B T"],
    config: ModelConfig,
) -> Float[Array, "B T H N"]:
    """Causal attention within segments, float32 softmax; what training and scoring run."""
    del config
    return grouped_attention(
        q_BTHN, k_BTKN.swapaxes(1, 2), v_BTKN.swapaxes(1, 2), causal_mask(segment_ids_BT)
    )


def grouped_attention(
    q_BTHN: Float[Array, "B T H N"],
    k_BKSN: Float[Array, "B K S N"],
    v_BKSN: Float[Array, "B K S N"],
    mask_BTS: Bool[Array, "B T S"],
) -> Float[Array, "B T H N"]:
    """Attention of each query to the slots that its mask names; float32 softmax."""
    B, T, H, N = q_BTHN.shape
    K, compute = k_BKSN.shape[1], q_BTHN.dtype
    q_BKGTN = q_BTHN.reshape(B, T, K, H // K, N).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum(
        "bkgtn,bksn->bkgts", q_BKGTN, k_BKSN.astype(compute), preferred_element_type=jnp.float32
    )
    scores = jnp.where(mask_BTS[:, None, None, :, :], scores * N**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(compute)
    out_BKGTN = jnp.einsum("bkgts,bksn->bkgtn", weights, v_BKSN.astype(compute))
    return out_BKGTN.transpose(0, 3, 1, 2, 4).reshape(B, T, H, N)


def causal_mask(segment_ids_BT: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Earlier or same position, same segment."""
    T = segment_ids_BT.shape[1]
    causal = jnp.tril(jnp.ones((T, T), bool))
    return causal[None] & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])
