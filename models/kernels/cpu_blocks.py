"""Causal attention by blocks of queries, shaped for XLA's CPU backend; it runs on any platform.

Shapes: B batch, T query time, S key time, H heads, K kv heads, G = H/K query heads a kv head, N head_dim, Q queries
of one block, R = G * Q of them over a group; with groups (`models.groups`) a row is a folded one of U slots.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.groups import Group, unfold
from models.kernels.products import einsum_float32
from models.kernels.xla import MASKED_SCORE

_LEAST_BLOCK = 128
_MOST_BLOCKS = 8
"""Products over fewer queries lose more than the masked half costs; more blocks only lengthen the program."""


def attention(
    q_BTHN: Float[Array, "B T H N"],
    k_BSKN: Float[Array, "B S K N"],
    v_BSKN: Float[Array, "B S K N"],
    segment_ids_BS: Int[Array, "B S"],
) -> Float[Array, "B T H N"]:
    """Causal attention within segments: each block of queries against the keys up to its end only.

    The T queries are those of the last T of S slots; in self-attention S is T.

    Half of the scores is never computed, and none are kept: the backward pass computes them again from the
    log-normalisers (FlashAttention, Dao et al. 2022, algorithm 4).
    """
    B, T, H, N = q_BTHN.shape
    K = k_BSKN.shape[2]
    q_BKGTN = q_BTHN.reshape(B, T, K, H // K, N).transpose(0, 2, 3, 1, 4)
    k_BKSN, v_BKSN = (x.transpose(0, 2, 1, 3) for x in (k_BSKN, v_BSKN))
    out_BKGTN = _blocked(q_BKGTN, k_BKSN, v_BKSN, segment_ids_BS)
    return out_BKGTN.transpose(0, 3, 1, 2, 4).reshape(B, T, H, N)


def grouped_attention(
    q_BUHN: Float[Array, "B U H N"],
    k_BUKN: Float[Array, "B U K N"],
    v_BUKN: Float[Array, "B U K N"],
    segment_ids_BU: Int[Array, "B U"],
    group: Group,
) -> Float[Array, "B U H N"]:
    """Attention of folded groups: a prompt's queries once a group, the others against their own row's keys."""
    L, args = group.prompt, (q_BUHN, k_BUKN, v_BUKN, segment_ids_BU)
    prompts = attention(*(x[:, :L] for x in args))
    q = q_BUHN[:, L:].reshape(len(q_BUHN) * group.size, -1, *q_BUHN.shape[2:])
    rest = attention(q, *(unfold(x, group) for x in args[1:]))
    return jnp.concatenate([prompts, rest.reshape(len(q_BUHN), -1, *q_BUHN.shape[2:])], axis=1)


def _blocks(length: int) -> list[tuple[int, int]]:
    """(start, end) of each block of queries."""
    size = max(_LEAST_BLOCK, -(-length // _MOST_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _mask(segments_BS: Array, start: int, end: int, first: int, last: int) -> Array:
    """`[B, Q, C]`: which of the slots `first:last` each query of the slots `start:end` sees."""
    earlier = jnp.arange(start, end)[:, None] >= jnp.arange(first, last)[None, :]
    return earlier[None] & (segments_BS[:, start:end, None] == segments_BS[:, None, first:last])


def _forward(q: Array, k: Array, v: Array, segments: Array) -> tuple[Array, Array]:
    """Output `[B, K, G, T, N]` and the log-normalisers of the scores `[B, K, G, T]`, float32."""
    B, K, G, T, N = q.shape
    before = k.shape[2] - T
    outs, normalisers = [], []
    for start, stop in _blocks(T):
        end = before + stop
        q_BKRN = q[:, :, :, start:stop].reshape(B, K, -1, N)
        s = einsum_float32("bkrn,bksn->bkrs", q_BKRN, k[:, :, :end])
        mask_BQS = _mask(segments, before + start, end, 0, end)
        s = jnp.where(mask_BQS[:, None, None], s.reshape(B, K, G, -1, end) * N**-0.5, MASKED_SCORE)
        top = jnp.max(s, axis=-1, keepdims=True)
        p = jnp.exp(s - top)
        total = jnp.sum(p, axis=-1, keepdims=True)
        p_BKRS = p.astype(q.dtype).reshape(B, K, -1, end)
        out = einsum_float32("bkrs,bksn->bkrn", p_BKRS, v[:, :, :end])
        outs.append((out.reshape(B, K, G, stop - start, N) / total).astype(q.dtype))
        normalisers.append((top + jnp.log(total))[..., 0])
    return jnp.concatenate(outs, axis=3), jnp.concatenate(normalisers, axis=3)


@jax.custom_vjp
def _blocked(q: Array, k: Array, v: Array, segments: Array) -> Array:
    """Attention of q `[B, K, G, T, N]` to k and v `[B, K, S, N]`."""
    return _forward(q, k, v, segments)[0]


def _blocked_fwd(q: Array, k: Array, v: Array, segments: Array) -> tuple[Array, tuple[Array, ...]]:
    out, normaliser = _forward(q, k, v, segments)
    return out, (q, k, v, segments, out, normaliser)


def _blocked_bwd(kept: tuple[Array, ...], d_out: Array) -> tuple[Array, Array, Array, None]:
    """By blocks of keys, with scores `[S, R]`: no product has to turn them, at which XLA's CPU backend is slow."""
    q, k, v, segments, out, normaliser = kept
    B, K, G, T, N = q.shape
    # sum_s p_s dp_s, the term that the softmax subtracts, is the output times its cotangent.
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    dqs, dks, dvs = [], [], []
    before = k.shape[2] - T
    for start, end in _blocks(k.shape[2]):
        first = max(start - before, 0)  # of the queries that may see these keys
        k_BKSN, v_BKSN = k[:, :, start:end], v[:, :, start:end]
        q_BKRN, d_out_BKRN = (x[:, :, :, first:].reshape(B, K, -1, N) for x in (q, d_out))
        normaliser_BK1R, inner_BK1R = (x[:, :, :, first:].reshape(B, K, 1, -1) for x in (normaliser, inner))
        mask_BSQ = _mask(segments, before + first, before + T, start, end).swapaxes(1, 2)
        mask_BSR = jnp.broadcast_to(mask_BSQ[:, :, None], (B, end - start, G, T - first)).reshape(
            B, end - start, -1
        )
        s = einsum_float32("bksn,bkrn->bksr", k_BKSN, q_BKRN) * N**-0.5
        p = jnp.where(mask_BSR[:, None], jnp.exp(s - normaliser_BK1R), 0.0)
        dp = einsum_float32("bksn,bkrn->bksr", v_BKSN, d_out_BKRN)
        ds = (p * (dp - inner_BK1R) * N**-0.5).astype(q.dtype)
        dvs.append(einsum_float32("bksr,bkrn->bksn", p.astype(q.dtype), d_out_BKRN))
        dks.append(einsum_float32("bksr,bkrn->bksn", ds, q_BKRN))
        dq_BKNR = einsum_float32("bkns,bksr->bknr", k_BKSN.swapaxes(2, 3), ds)
        dqs.append((first, dq_BKNR.reshape(B, K, N, G, T - first)))
    dk, dv = (jnp.concatenate(x, axis=2) for x in (dks, dvs))
    dq = _sum_of_ends(dqs, T).transpose(0, 1, 3, 4, 2)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


def _sum_of_ends(parts: list[tuple[int, Array]], length: int) -> Array:
    """Sum over arrays `[..., first:length]`, one for each (first, array), in order of `first`, which starts at 0.

    By slices between the firsts, and apart from what reads it: XLA's CPU backend fuses a sum of padded arrays with the
    rotation's backward pass, and computes it entry by entry.
    """
    edges = sorted({first for first, _ in parts}) + [length]
    slices = [
        sum(x[..., start - first : end - first] for first, x in parts if first <= start)
        for start, end in pairwise(edges)
    ]
    found: Array = jax.lax.optimization_barrier(jnp.concatenate(slices, axis=-1))
    return found


_blocked.defvjp(_blocked_fwd, _blocked_bwd)
