"""RMSNorm, rotary embeddings, attention and SwiGLU, with logical axis names on every parameter.

Shapes: B batch, T time, D model, H heads, K kv heads, N head_dim, F feed-forward.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.attention import self_attention
from models.axes import constrain
from models.cache import LayerCache, Reach
from models.config import ModelConfig
from models.groups import Group
from models.products import matrix_product

Initializer = Callable[..., Any]


def scaled_normal(stddev: float, *names: str) -> Initializer:
    """A normal initialiser boxed with logical axis names."""
    return nn.with_logical_partitioning(nn.initializers.normal(stddev), names)


def dense(
    x: Float[Array, "... I"], w: Float[Array, "I ..."], scale: Float[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """`x @ w` as one flat `matrix_product`: XLA's CPU backend runs the gradients of batched ones 3x slower.

    With a `scale` of each output (of int8 weights, see `models.fused`) it is `(x @ w) * scale`: the weights are
    whole numbers that bfloat16 holds exactly, so that only the sum, in float32, is scaled and rounded.
    """
    flat, matrix = x.reshape(-1, x.shape[-1]), w.reshape(w.shape[0], -1)
    if matrix.dtype.itemsize < x.dtype.itemsize:
        # Tied to this step's input: XLA would otherwise convert the weights once, before the loop over decode
        # steps, and keep them in the large dtype beside the small one.
        flat, matrix = jax.lax.optimization_barrier((flat, matrix))
    matrix = matrix.astype(x.dtype)
    out = matrix_product(flat, matrix, x.dtype if scale is None else jnp.float32)
    if scale is not None:
        out = out * scale.reshape(1, -1)
    return out.astype(x.dtype).reshape(*x.shape[:-1], *w.shape[1:])


class RMSNorm(nn.Module):
    """`x / rms(x) * scale` in float32 (Zhang and Sennrich 2019, eq. 4)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale_D: Any = self.param("scale", init, (x_BTD.shape[-1],), jnp.dtype(self.config.param_dtype))
        x = x_BTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.config.norm_eps)
        return (x * scale_D.astype(jnp.float32)[None, None, :]).astype(jnp.dtype(self.config.compute_dtype))


def rope_tables(
    positions_BT: Int[Array, "B T"], config: ModelConfig
) -> tuple[Float[Array, "B T N/2"], Float[Array, "B T N/2"]]:
    """Sine and cosine of `position * theta^(-2i/N)` (Su et al. 2021, eq. 15), float32."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BT.astype(jnp.float32)[:, :, None] * frequency[None, None, :]
    tables = jnp.sin(angle), jnp.cos(angle)
    return jax.lax.platform_dependent(*tables, cpu=_apart, default=lambda *x: x)


def _apart(*tables: Array) -> tuple[Array, ...]:
    """The same values as products with the identity, which XLA's CPU backend does not fuse into what reads them.

    It would compute sines and cosines anew in every rotation, for each head and layer: a tenth of a decode step.
    """
    identity = jnp.eye(tables[0].shape[-1], dtype=tables[0].dtype)
    return tuple(jnp.matmul(x, identity, precision=jax.lax.Precision.HIGHEST) for x in tables)


def apply_rope(
    x_BTHN: Float[Array, "B T H N"], sin: Float[Array, "B T N/2"], cos: Float[Array, "B T N/2"]
) -> Float[Array, "B T H N"]:
    """Rotates the two halves of each head against each other (the Llama checkpoints' pairing)."""
    first, second = jnp.split(x_BTHN.astype(jnp.float32), 2, axis=-1)
    sin, cos = sin[:, :, None, :], cos[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHN.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention; float32 softmax; optional cache updated in place."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rope: tuple[Array, Array],
        segment_ids_BT: Int[Array, "B T"],
        cache: LayerCache | None = None,
        reach: Reach | None = None,
        group: Group | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        c = self.config
        q_BTHN, k_BTKN, v_BTKN = self._project(x_BTD)
        q_BTHN, k_BTKN = apply_rope(q_BTHN, *rope), apply_rope(k_BTKN, *rope)
        q_BTHN = constrain(q_BTHN, "batch", "length", "activation_heads", "head_dim")
        k_BTKN = constrain(k_BTKN, "batch", "length", "activation_kv_heads", "head_dim")
        v_BTKN = constrain(v_BTKN, "batch", "length", "activation_kv_heads", "head_dim")
        if cache is None:
            out_BTHN = self_attention(q_BTHN, k_BTKN, v_BTKN, segment_ids_BT, c, group)
        else:
            assert reach is not None
            cache = cache.write(k_BTKN, v_BTKN, reach.write_at)
            out_BTHN = cache.attend(q_BTHN, reach)
        D, H, N = c.d_model, c.num_heads, c.head_dim
        out_std = (H * N) ** -0.5 * (2 * c.num_layers) ** -0.5
        init = scaled_normal(out_std, "heads", "head_dim", "embed")
        wo: Any = self.param("wo", init, (H, N, D), jnp.dtype(c.param_dtype))
        out_BTF = out_BTHN.reshape(*x_BTD.shape[:2], H * N)
        return dense(out_BTF, wo.reshape(H * N, D), self.get_variable("params", "wo_scale")), cache

    def _project(self, x_BTD: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        """Queries `[B, T, H, N]`, keys and values `[B, T, K, N]`, of parameters as trained or as `models.fused`."""
        c = self.config
        D, H, K, N = c.d_model, c.num_heads, c.num_kv_heads, c.head_dim
        if self.has_variable("params", "wqkv"):
            wqkv: Any = self.get_variable("params", "wqkv")
            qkv = dense(x_BTD, wqkv, self.get_variable("params", "wqkv_scale"))
            q_BTHN = qkv[..., :-2, :].reshape(*x_BTD.shape[:2], H, N)
            return q_BTHN, qkv[..., -2, :], qkv[..., -1, :]
        stored, std = jnp.dtype(c.param_dtype), D**-0.5
        wq: Any = self.param("wq", scaled_normal(std, "embed", "heads", "head_dim"), (D, H, N), stored)
        wk: Any = self.param("wk", scaled_normal(std, "embed", "kv_heads", "head_dim"), (D, K, N), stored)
        wv: Any = self.param("wv", scaled_normal(std, "embed", "kv_heads", "head_dim"), (D, K, N), stored)
        return dense(x_BTD, wq), dense(x_BTD, wk), dense(x_BTD, wv)


class SwiGLU(nn.Module):
    """`(silu(x W_gate) * x W_up) W_down` (Shazeer 2020, eq. 6)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        stored = jnp.dtype(c.param_dtype)
        std, out_std = c.d_model**-0.5, c.d_ff**-0.5 * (2 * c.num_layers) ** -0.5
        if self.has_variable("params", "gate_up"):  # laid out by `models.fused`
            gate_up: Any = self.get_variable("params", "gate_up")
            both = dense(x_BTD, gate_up, self.get_variable("params", "gate_up_scale"))
            gated, up_BTF = both[..., 0, :], both[..., 1, :]
        else:
            gate: Any = self.param("gate", scaled_normal(std, "embed", "mlp"), (c.d_model, c.d_ff), stored)
            up: Any = self.param("up", scaled_normal(std, "embed", "mlp"), (c.d_model, c.d_ff), stored)
            gated, up_BTF = dense(x_BTD, gate), dense(x_BTD, up)
        down: Any = self.param("down", scaled_normal(out_std, "mlp", "embed"), (c.d_ff, c.d_model), stored)
        h_BTF = jax.nn.silu(gated) * up_BTF
        h_BTF = constrain(h_BTF, "batch", "length", "activation_mlp")
        return dense(h_BTF, down, self.get_variable("params", "down_scale"))


class Block(nn.Module):
    """Pre-norm transformer block."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rope: tuple[Array, Array],
        segment_ids_BT: Int[Array, "B T"],
        cache: LayerCache | None = None,
        reach: Reach | None = None,
        group: Group | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        attended, cache = Attention(self.config, name="attention")(
            RMSNorm(self.config, name="attention_norm")(x_BTD), rope, segment_ids_BT, cache, reach, group
        )
        x_BTD = x_BTD + attended
        x_BTD = x_BTD + SwiGLU(self.config, name="mlp")(RMSNorm(self.config, name="mlp_norm")(x_BTD))
        return constrain(x_BTD, "batch", "length", "activation_embed"), cache
