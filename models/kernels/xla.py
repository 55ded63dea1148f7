"""Attention in plain einsums, for any platform, shape and dtype.

Shapes: B batch, T query time, S key time, H heads, K kv heads, G = H/K query heads a kv head, N head_dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.kernels.products import einsum_float32

MASKED_SCORE = float(jnp.finfo(jnp.float32).min)
"""The score of a masked key: finite, so that a query that sees no key gives no NaN."""


@jax.checkpoint
def attention(
    q_BTHN: Float[Array, "B T H N"],
    k_BSKN: Float[Array, "B S K N"],
    v_BSKN: Float[Array, "B S K N"],
    segment_ids_BS: Int[Array, "B S"],
) -> Float[Array, "B T H N"]:
    """Causal attention within segments, S = T; scores are recomputed in the backward pass, not kept."""
    B, T, H, N = q_BTHN.shape
    K = k_BSKN.shape[2]
    q_BTKGN = q_BTHN.reshape(B, T, K, H // K, N)
    scores_BKGTS = einsum_float32("BTKGN,BSKN->BKGTS", q_BTKGN, k_BSKN) * N**-0.5
    same_BTS = segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :]
    mask_BTS = same_BTS & jnp.tril(jnp.ones((T, T), bool))[None]
    weights = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores_BKGTS, MASKED_SCORE), axis=-1)
    out_BTKGN = einsum_float32("BKGTS,BSKN->BTKGN", weights.astype(v_BSKN.dtype), v_BSKN)
    return out_BTKGN.astype(q_BTHN.dtype).reshape(B, T, H, N)
