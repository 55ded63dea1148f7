"""Causal attention by blocks of queries, shaped for XLA's CPU backend; it runs on any platform.

Shapes: B batch, T query time, S key time, H heads, K kv heads, G = H/K query heads a kv head, N head_dim, Q queries
of one block, R = G * Q of them over a group; with groups (`models.groups`) a row is a folded one of U slots.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.groups import Group, unfold
from models.kernels.products import MASKED_SCORE, einsum_float32

_LEAST_BLOCK = 128
_MOST_BLOCKS = 8
"""Smaller products lose more than the masked half costs; more blocks only lengthen the program."""


@jax.checkpoint
def attention(
    q_BTHN: Float[Array, "B T H N"],
    k_BSKN: Float[Array, "B S K N"],
    v_BSKN: Float[Array, "B S K N"],
    segment_ids_BS: Int[Array, "B S"],
) -> Float[Array, "B T H N"]:
    """Causal attention within segments: each block of queries against the keys up to its end only.

    The T queries are those of the last T of S slots; in self-attention S is T. Nearly half of the scores is never
    computed, and none are kept: the backward pass computes them again.
    """
    B, T, H, N = q_BTHN.shape
    S, K = k_BSKN.shape[1:3]
    q_BKGTN = q_BTHN.reshape(B, T, K, H // K, N).transpose(0, 2, 3, 1, 4)
    k_BKSN, v_BKSN = (x.transpose(0, 2, 1, 3) for x in (k_BSKN, v_BSKN))
    blocks = []
    for start, stop in _blocks(T):
        first, end = S - T + start, S - T + stop  # slots of the queries
        q_BKRN = q_BKGTN[:, :, :, start:stop].reshape(B, K, -1, N)
        scores = einsum_float32("BKRN,BKSN->BKRS", q_BKRN, k_BKSN[:, :, :end])
        same = segment_ids_BS[:, first:end, None] == segment_ids_BS[:, None, :end]
        mask_BQS = same & (jnp.arange(first, end)[:, None] >= jnp.arange(end)[None, :])[None]
        scores_BKGQS = scores.reshape(B, K, H // K, stop - start, end) * N**-0.5
        scores_BKGQS = jnp.where(mask_BQS[:, None, None], scores_BKGQS, MASKED_SCORE)
        top = jax.lax.stop_gradient(jnp.max(scores_BKGQS, axis=-1, keepdims=True))
        p_BKGQS = jnp.exp(scores_BKGQS - top)
        total = jnp.sum(p_BKGQS, axis=-1, keepdims=True)
        p_BKRS = p_BKGQS.astype(q_BTHN.dtype).reshape(B, K, -1, end)
        out = einsum_float32("BKRS,BKSN->BKRN", p_BKRS, v_BKSN[:, :, :end])
        blocks.append((out.reshape(B, K, H // K, stop - start, N) / total).astype(q_BTHN.dtype))
    return jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, H, N)


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
