"""Attention of new tokens to a KV cache.

Shapes: B batch, T new tokens, H heads, K kv heads, R = T * H/K queries of a kv head, N head_dim, S slots, P prefixes
of C slots.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from models.decode.cache import LayerCache, Reach
from models.kernels.products import MASKED_SCORE, einsum_float32


def cached_attention(q_BTHN: Float[Array, "B T H N"], cache: LayerCache, reach: Reach) -> Float[Array, "B T H N"]:
    """Attention of T queries to the shared prefix and to their own row, with a float32 softmax.

    The scales of an int8 cache multiply scores and weights, which are fewer than keys and values.
    """
    B, T, H, N = q_BTHN.shape
    (K, S), compute = cache.keys.shape[-3:-1], q_BTHN.dtype
    G = H // K
    q_BKRN = (q_BTHN * N**-0.5).reshape(B, T, K, G, N).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, N)
    k_BKSN, v_BKSN = (x.reshape(B, K, S, N).astype(compute) for x in (cache.keys, cache.values))
    # Keys first: XLA's CPU backend then reads the cache as it lies.
    scores_BKSR = einsum_float32("BKSN,BKRN->BKSR", k_BKSN, q_BKRN)
    scores_BKGTS = scores_BKSR.swapaxes(2, 3).reshape(B, K, G, T, S)
    if cache.key_scales is not None:
        scores_BKGTS = scores_BKGTS * cache.key_scales.reshape(B, K, 1, 1, S)
    scores_BKGTS = jnp.where(reach.mask_BTS[:, None, None, :, :], scores_BKGTS, MASKED_SCORE)
    top = jnp.max(scores_BKGTS, axis=-1, keepdims=True)
    if cache.prefix_keys is not None:
        assert reach.prefix_PC is not None
        P, C = reach.prefix_PC.shape
        shared = einsum_float32("PKRN,PKCN->PKRC", _by_prefix(q_BKRN, P), cache.prefix_keys)
        shared = jnp.where(reach.prefix_PC[:, None, None, :], shared, MASKED_SCORE)
        shared_BKGTC = _by_row(shared, B).reshape(B, K, G, T, C)
        top = jnp.maximum(top, jnp.max(shared_BKGTC, axis=-1, keepdims=True))
    weights_BKGTS = jnp.exp(scores_BKGTS - top)
    total = jnp.sum(weights_BKGTS, axis=-1, keepdims=True)
    if cache.value_scales is not None:
        weights_BKGTS = weights_BKGTS * cache.value_scales.reshape(B, K, 1, 1, S)
    weights_BKRS = weights_BKGTS.astype(compute).reshape(B, K, G * T, S)
    out_BKRN = einsum_float32("BKRS,BKSN->BKRN", weights_BKRS, v_BKSN)
    if cache.prefix_values is not None:
        weights_BKGTC = jnp.exp(shared_BKGTC - top)
        total = total + jnp.sum(weights_BKGTC, axis=-1, keepdims=True)
        weights_PKRC = _by_prefix(weights_BKGTC.astype(compute).reshape(B, K, G * T, C), P)
        out_BKRN += _by_row(einsum_float32("PKRC,PKCN->PKRN", weights_PKRC, cache.prefix_values), B)
    out_BKGTN = (out_BKRN.reshape(B, K, G, T, N) / total).astype(compute)
    return out_BKGTN.transpose(0, 3, 1, 2, 4).reshape(B, T, H, N)


def _by_prefix(x_BKRX: Array, P: int) -> Array:
    """`[P, K, B / P * R, X]`: the queries of all rows that share a prefix, beside each other."""
    B, K, R, X = x_BKRX.shape
    return x_BKRX.reshape(P, B // P, K, R, X).swapaxes(1, 2).reshape(P, K, -1, X)


def _by_row(x_PKRX: Array, B: int) -> Array:
    """Undoes `_by_prefix`."""
    P, K, R, X = x_PKRX.shape
    return x_PKRX.reshape(P, K, B // P, R * P // B, X).swapaxes(1, 2).reshape(B, K, -1, X)
