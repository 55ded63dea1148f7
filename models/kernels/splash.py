"""Splash attention: JAX's Pallas flash kernel for TPUs.

Shapes: B batch, T time, H heads, K kv heads, N head_dim.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.axes import RULES, nn


def refusal(_dtype: jnp.dtype, head_dim: int) -> str:
    """Why the kernel cannot serve; "" where it can."""
    return f"head_dim={head_dim} is no multiple of 64" if head_dim % 64 else ""


def attention(
    q_BTHN: Float[Array, "B T H N"],
    k_BTKN: Float[Array, "B T K N"],
    v_BTKN: Float[Array, "B T K N"],
    segment_ids_BT: Int[Array, "B T"],
    *,
    interpret: bool = False,
) -> Float[Array, "B T H N"]:
    """Causal attention within segments, on each device's own rows and heads: the partitioner cannot split a kernel.

    T is a multiple of 128. `interpret` runs the kernel on any platform, slowly, to test it.
    """
    local = partial(_local, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q_BTHN, k_BTKN, v_BTKN, segment_ids_BT)
    rows = nn.logical_to_mesh_axes(("batch", "length", "activation_heads", "head_dim"), RULES)
    segments = nn.logical_to_mesh_axes(("batch", "length"), RULES)
    assert rows is not None and segments is not None
    return jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows, segments), out_specs=rows, check_vma=False)(
        q_BTHN, k_BTKN, v_BTKN, segment_ids_BT
    )


def _local(q_BTHN: Array, k_BTKN: Array, v_BTKN: Array, segment_ids_BT: Array, interpret: bool) -> Array:
    # Imported here: Pallas takes a second to load, and only a program that may run on a TPU needs it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, H, N = q_BTHN.shape[1:]
    size = next(size for size in (512, 384, 256, 128) if T % size == 0)
    sizes = splash.BlockSizes(
        block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size
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
