"""RMSNorm, rotary embeddings, attention and SwiGLU, with logical axis names on every parameter.

Shapes: B batch, T time, D model, H heads, K kv heads, G = H/K query heads a kv head, N head_dim, F feed-forward, C the
two halves of SwiGLU.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.axes import constrain
from models.config import ModelConfig
from models.decode.attention import cached_attention
from models.decode.cache import LayerCache, Reach
from models.groups import Group
from models.kernels.attention import self_attention
from models.kernels.products import computed_once, einsum

Rope = tuple[Float[Array, "B T N/2"], Float[Array, "B T N/2"]]  # sine and cosine of each position's rotation


class AuxSums(flax.struct.PyTreeNode):
    """Sums over a batch's real tokens and over layers, which the training step weighs and adds to its loss.

    Sums and counts, so that micro-batches and devices add up before one division. Empty for a dense model: it then adds
    nothing to a compiled program.

    Attributes:
      losses: name to (total, count) of a loss, such as a router's balance or z-loss.
      loads: name to tokens that each expert got.
    """

    losses: Mapping[str, tuple[Float[Array, ""], Float[Array, ""]]] = flax.struct.field(default_factory=dict)
    loads: Mapping[str, Float[Array, " E"]] = flax.struct.field(default_factory=dict)

    def sum_layers(self) -> "AuxSums":
        """Of sums stacked over layers, `[L, ...]`."""
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), self)


def scaled_normal(stddev: float, *names: str) -> Callable[..., Any]:
    """A normal initialiser boxed with logical axis names."""
    return nn.with_logical_partitioning(nn.initializers.normal(stddev), names)


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


def rope_tables(positions_BT: Int[Array, "B T"], theta: float, head_dim: int) -> Rope:
    """Sine and cosine of `position * theta^(-2i/N)` (Su et al. 2021, eq. 15), float32."""
    half = head_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BT.astype(jnp.float32)[:, :, None] * frequency[None, None, :]
    return computed_once(jnp.sin(angle)), computed_once(jnp.cos(angle))


def apply_rope(
    x_BTHN: Float[Array, "B T H N"], sin: Float[Array, "B T N/2"], cos: Float[Array, "B T N/2"]
) -> Float[Array, "B T H N"]:
    """Rotates the two halves of each head against each other (the Llama checkpoints' pairing)."""
    first, second = jnp.split(x_BTHN.astype(jnp.float32), 2, axis=-1)
    sin, cos = sin[:, :, None, :], cos[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHN.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023); with a cache, the new tokens are appended to it."""

    config: ModelConfig
    group: Group | None = None  # of folded rows; not with a cache

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rope: Rope,
        segment_ids_BT: Int[Array, "B T"],
        cache: LayerCache | None = None,
        reach: Reach | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        c = self.config
        D, H, N = c.d_model, c.num_heads, c.head_dim
        q_BTHN, k_BTKN, v_BTKN = self._project(x_BTD)
        q_BTHN, k_BTKN = apply_rope(q_BTHN, *rope), apply_rope(k_BTKN, *rope)
        q_BTHN = constrain(q_BTHN, "batch", "length", "activation_heads", "head_dim")
        k_BTKN = constrain(k_BTKN, "batch", "length", "activation_kv_heads", "head_dim")
        v_BTKN = constrain(v_BTKN, "batch", "length", "activation_kv_heads", "head_dim")
        if cache is None:
            out_BTHN = self_attention(
                q_BTHN, k_BTKN, v_BTKN, segment_ids_BT, kernel=c.attention_kernel, group=self.group
            )
        else:
            assert reach is not None
            cache = cache.write(k_BTKN, v_BTKN, reach.write_at)
            out_BTHN = cached_attention(q_BTHN, cache, reach)
        out_std = (H * N) ** -0.5 * (2 * c.num_layers) ** -0.5
        init = scaled_normal(out_std, "heads", "head_dim", "embed")
        wo_HND: Any = self.param("wo", init, (H, N, D), jnp.dtype(c.param_dtype))
        scale: Any = self.get_variable("params", "wo_scale")
        return einsum("BTHN,HND->BTD", out_BTHN, wo_HND, scale=scale), cache

    def _project(self, x_BTD: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        """Queries `[B, T, H, N]`, keys and values `[B, T, K, N]`."""
        c = self.config
        D, H, K, N = c.d_model, c.num_heads, c.num_kv_heads, c.head_dim
        if self.has_variable("params", "wqkv"):  # laid out by `models.decode.layout`
            wqkv_DKGN: Any = self.get_variable("params", "wqkv")
            scale: Any = self.get_variable("params", "wqkv_scale")
            qkv_BTKGN = einsum("BTD,DKGN->BTKGN", x_BTD, wqkv_DKGN, scale=scale)
            q_BTHN = qkv_BTKGN[..., :-2, :].reshape(*x_BTD.shape[:2], H, N)
            return q_BTHN, qkv_BTKGN[..., -2, :], qkv_BTKGN[..., -1, :]
        stored, std = jnp.dtype(c.param_dtype), D**-0.5
        wq_DHN: Any = self.param("wq", scaled_normal(std, "embed", "heads", "head_dim"), (D, H, N), stored)
        wk_DKN: Any = self.param("wk", scaled_normal(std, "embed", "kv_heads", "head_dim"), (D, K, N), stored)
        wv_DKN: Any = self.param("wv", scaled_normal(std, "embed", "kv_heads", "head_dim"), (D, K, N), stored)
        q_BTHN = einsum("BTD,DHN->BTHN", x_BTD, wq_DHN)
        k_BTKN = einsum("BTD,DKN->BTKN", x_BTD, wk_DKN)
        return q_BTHN, k_BTKN, einsum("BTD,DKN->BTKN", x_BTD, wv_DKN)


class SwiGLU(nn.Module):
    """`(silu(x W_gate) * x W_up) W_down` (Shazeer 2020, eq. 6)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        D, F, stored = c.d_model, c.d_ff, jnp.dtype(c.param_dtype)
        std, out_std = D**-0.5, F**-0.5 * (2 * c.num_layers) ** -0.5
        if self.has_variable("params", "gate_up"):  # laid out by `models.decode.layout`
            gate_up_DCF: Any = self.get_variable("params", "gate_up")
            scale: Any = self.get_variable("params", "gate_up_scale")
            both_BTCF = einsum("BTD,DCF->BTCF", x_BTD, gate_up_DCF, scale=scale)
            gate_BTF, up_BTF = both_BTCF[..., 0, :], both_BTCF[..., 1, :]
        else:
            gate_DF: Any = self.param("gate", scaled_normal(std, "embed", "mlp"), (D, F), stored)
            up_DF: Any = self.param("up", scaled_normal(std, "embed", "mlp"), (D, F), stored)
            gate_BTF, up_BTF = einsum("BTD,DF->BTF", x_BTD, gate_DF), einsum("BTD,DF->BTF", x_BTD, up_DF)
        down_FD: Any = self.param("down", scaled_normal(out_std, "mlp", "embed"), (F, D), stored)
        h_BTF = constrain(jax.nn.silu(gate_BTF) * up_BTF, "batch", "length", "activation_mlp")
        return einsum("BTF,FD->BTD", h_BTF, down_FD, scale=self.get_variable("params", "down_scale"))


class Block(nn.Module):
    """Pre-norm transformer block."""

    config: ModelConfig
    group: Group | None = None  # of folded rows; not with a cache

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rope: Rope,
        segment_ids_BT: Int[Array, "B T"],
        cache: LayerCache | None = None,
        reach: Reach | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[AuxSums, LayerCache | None]]:
        """The residual stream after the block, and its auxiliary sums and updated cache."""
        h_BTD = RMSNorm(self.config, name="attention_norm")(x_BTD)
        attention = Attention(self.config, self.group, name="attention")
        attended_BTD, cache = attention(h_BTD, rope, segment_ids_BT, cache, reach)
        x_BTD = x_BTD + attended_BTD
        h_BTD = RMSNorm(self.config, name="mlp_norm")(x_BTD)
        x_BTD = x_BTD + SwiGLU(self.config, name="mlp")(h_BTD)
        return constrain(x_BTD, "batch", "length", "activation_embed"), (AuxSums(), cache)
