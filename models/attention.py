"""Attention over rows of segments, behind one function.

Shapes: B batch, T query time, S key slots, H heads, K kv heads, G = H/K query heads a kv head, N head_dim, Q queries
of one block, R = G * Q of them over a group.
"""

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from models.axes import RULES, nn
from models.config import ModelConfig
from models.groups import Group, fold, unfold
from models.products import einsum_float32

_LEAST_BLOCK = 128
_MOST_BLOCKS = 8
"""Products over fewer queries lose more than the masked half costs; more blocks only lengthen the program."""

HIDDEN = float(jnp.finfo(jnp.float32).min)
"""The score of what a query does not see: finite, so that a query that sees nothing is no NaN."""


def self_attention(
    q_BTHN: Float[Array, "B T H N"],
    k_BTKN: Float[Array, "B T K N"],
    v_BTKN: Float[Array, "B T K N"],
    segment_ids_BT: Int[Array, "B T"],
    config: ModelConfig,
    group: Group | None = None,
) -> Float[Array, "B T H N"]:
    """Causal attention within segments, float32 softmax; what training and scoring run.

    The implementation is chosen when a program is lowered, so one traced program serves every platform:

    - TPU: the splash kernel, where T is a multiple of 128 and head_dim of 64;
    - CUDA: cuDNN's flash kernel, where the dtype is bfloat16 or float16, T is even and head_dim is a multiple of 8
      of at most 128; only where JAX's default backend is a GPU, because its checks ask the driver while tracing;
    - everywhere else `blocked_attention`, which has no limits.

    Slots of padding (segment 0) attend to earlier padding, as any segment does. Where each row is a whole group
    (`models.groups`), attention is that of the group's own rows.
    """
    if group is not None:
        folded = (q_BTHN, k_BTKN, v_BTKN, segment_ids_BT)
        apart = partial(_apart, config=config, group=group)
        return jax.lax.platform_dependent(
            *folded, cpu=apart, default=partial(_whole, config=config, group=group)
        )
    T, N = q_BTHN.shape[1], config.head_dim
    kernels: dict[str, Any] = {}
    if T % 128 == 0 and N % 64 == 0:
        kernels["tpu"] = splash_attention
    half = q_BTHN.dtype in (jnp.bfloat16, jnp.float16)
    if half and T % 2 == 0 and N % 8 == 0 and N <= 128 and jax.default_backend() == "gpu":
        kernels["cuda"] = cudnn_attention
    args = (q_BTHN, k_BTKN, v_BTKN, segment_ids_BT)
    if not kernels:
        return blocked_attention(*args)
    return jax.lax.platform_dependent(*args, **kernels, default=blocked_attention)


def _whole(q: Array, k: Array, v: Array, segments: Array, *, config: ModelConfig, group: Group) -> Array:
    """`self_attention` of groups: of all of their rows, as the kernels take them; prompts' queries are repeated."""
    q, k, v, segments = (unfold(x, group) for x in (q, k, v, segments))
    return fold(self_attention(q, k, v, segments, config), group)


def _apart(q: Array, k: Array, v: Array, segments: Array, *, config: ModelConfig, group: Group) -> Array:
    """`self_attention` of groups: prompts' queries once a group, those of what follows against their row's keys."""
    L = group.prompt
    prompts = self_attention(q[:, :L], k[:, :L], v[:, :L], segments[:, :L], config)
    rest = q[:, L:].reshape(len(q) * group.size, -1, *q.shape[2:])
    rest = blocked_attention(rest, *(unfold(x, group) for x in (k, v, segments)))
    return jnp.concatenate([prompts, rest.reshape(len(q), -1, *q.shape[2:])], axis=1)


def blocked_attention(
    q_BTHN: Float[Array, "B T H N"],
    k_BSKN: Float[Array, "B S K N"],
    v_BSKN: Float[Array, "B S K N"],
    segment_ids_BS: Int[Array, "B S"],
) -> Float[Array, "B T H N"]:
    """`self_attention` in plain XLA: by blocks of queries, each against the keys up to its end only.

    The T queries are those of the last T of S slots; in self-attention S is T.

    Half of the scores is never computed, and none outlive the pass: the backward pass computes them again from the
    log-normalisers (FlashAttention, Dao et al. 2022, algorithm 4).
    """
    B, T, H, N = q_BTHN.shape
    K = k_BSKN.shape[2]
    q_BKGTN = q_BTHN.reshape(B, T, K, H // K, N).transpose(0, 2, 3, 1, 4)
    k_BKSN, v_BKSN = (x.transpose(0, 2, 1, 3) for x in (k_BSKN, v_BSKN))
    out_BKGTN = _blocked(q_BKGTN, k_BKSN, v_BKSN, segment_ids_BS)
    return out_BKGTN.transpose(0, 3, 1, 2, 4).reshape(B, T, H, N)


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
        s = jnp.where(mask_BQS[:, None, None], s.reshape(B, K, G, -1, end) * N**-0.5, HIDDEN)
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


def cudnn_attention(
    q_BTHN: Float[Array, "B T H N"],
    k_BTKN: Float[Array, "B T K N"],
    v_BTKN: Float[Array, "B T K N"],
    segment_ids_BT: Int[Array, "B T"],
) -> Float[Array, "B T H N"]:
    """cuDNN's flash attention; segments are a mask, which it takes as an additive `[B, 1, T, T]` bias."""
    same = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return jax.nn.dot_product_attention(
        q_BTHN, k_BTKN, v_BTKN, mask=same[:, None], is_causal=True, implementation="cudnn"
    )


def splash_attention(
    q_BTHN: Float[Array, "B T H N"],
    k_BTKN: Float[Array, "B T K N"],
    v_BTKN: Float[Array, "B T K N"],
    segment_ids_BT: Int[Array, "B T"],
    *,
    interpret: bool = False,
) -> Float[Array, "B T H N"]:
    """The TPU kernel, on each device's own rows and heads: a kernel is not split by the partitioner.

    Args:
      q_BTHN, k_BTKN, v_BTKN: T a multiple of 128.
      segment_ids_BT: int32.
      interpret: run it on any platform, slowly, to test it.
    """
    local = partial(_splash, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q_BTHN, k_BTKN, v_BTKN, segment_ids_BT)
    rows = nn.logical_to_mesh_axes(("batch", "length", "activation_heads", "head_dim"), RULES)
    segments = nn.logical_to_mesh_axes(("batch", "length"), RULES)
    assert rows is not None and segments is not None
    specs: tuple[PartitionSpec, ...] = (rows, rows, rows, segments)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(
        q_BTHN, k_BTKN, v_BTKN, segment_ids_BT
    )


def _splash(q_BTHN: Array, k_BTKN: Array, v_BTKN: Array, segment_ids_BT: Array, interpret: bool) -> Array:
    # Imported here: Pallas takes a second to load, and only a program that may run on a TPU needs it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, H, N = q_BTHN.shape[1:]
    size = next(size for size in (512, 384, 256, 128) if T % size == 0)
    sizes = splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((T, T))] * H),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def row(q_THN: Array, k_TKN: Array, v_TKN: Array, segments_T: Array) -> Array:
        scaled_THN = q_THN * jnp.asarray(N**-0.5, q_THN.dtype)
        heads_first = (x.swapaxes(0, 1) for x in (scaled_THN, k_TKN, v_TKN))
        return kernel(*heads_first, segment_ids=splash.SegmentIds(segments_T, segments_T)).swapaxes(0, 1)

    return jax.vmap(row)(q_BTHN, k_BTKN, v_BTKN, segment_ids_BT)
