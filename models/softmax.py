"""Logits, and the softmax statistics of one chunk of positions, with a backward pass of one pass over the logits.

Shapes: B batch, T time, C one chunk of it, R = B * C, D model, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.axes import constrain
from models.config import ModelConfig
from models.kernels.products import einsum, sum_last


class TokenLogps(NamedTuple):
    """Per-token quantities, float32, nats; `x[b, t]` is about `tokens[b, t]` given the tokens before it.

    All but the first are of the distribution that the token was predicted from. 0 at t = 0, which nothing predicts.
    """

    logps: Float[Array, "B T"]  # log-probability of the token
    entropy: Float[Array, "B T"]
    logsumexp: Float[Array, "B T"]  # log-normaliser (for the z-loss)
    mean_logps: Float[Array, "B T"]  # mean over the vocabulary of the log-probs (for label smoothing)
    log_collision: Float[Array, "B T"]  # `log sum_v p_v^2`, the log-probability that two samples are equal (for WPO)


def compute_logits(
    hidden: Float[Array, "... D"], unembed_DV: Float[Array, "D V"], config: ModelConfig
) -> Float[Array, "... V"]:
    """Float32 logits; the product runs in the compute dtype."""
    compute = jnp.dtype(config.compute_dtype)
    return einsum("...D,DV->...V", hidden.astype(compute), unembed_DV.astype(compute), dtype=jnp.float32)


def likeliest_token(logits: Float[Array, "*batch V"]) -> Int[Array, "*batch"]:
    """The first of the most likely tokens, int32; 0 in a row of -inf, the last token in one with a NaN.

    `jnp.argmax` reduces pairs, which XLA's CPU backend does one entry at a time; it vectorises these two reductions,
    and the first of them is one that `logsumexp` needs as well.
    """
    last = logits.shape[-1] - 1
    ids = jnp.arange(last + 1, dtype=jnp.int32)
    return jnp.min(jnp.where(logits == jnp.max(logits, axis=-1, keepdims=True), ids, last), axis=-1)


@partial(jax.custom_vjp, nondiff_argnames=("config", "keep"))
def score_chunk(
    hidden_BCD: Float[Array, "B C D"],
    unembed_DV: Float[Array, "D V"],
    targets_BC: Int[Array, "B C"],
    temperature: Float[Array, ""],
    used: Bool[Array, ""] | None,
    config: ModelConfig,
    keep: bool,
) -> TokenLogps:
    """`TokenLogps` of one chunk; the backward pass is one pass over the logits, its products in the compute dtype.

    Where `used` is False (None is True) nothing is computed, and all quantities and gradients are 0. The logits are
    kept for the backward pass if `keep`, else computed again.
    """
    return _forward(hidden_BCD, unembed_DV, targets_BC, temperature, used, config, keep)[0]


def _scaled_logits(hidden: Array, unembed_DV: Array, temperature: Array, config: ModelConfig) -> Array:
    logits_BCV = compute_logits(hidden, unembed_DV, config) / temperature
    return constrain(logits_BCV, "batch", "length", "activation_vocab")


def _hits(logits_BCV: Array, targets_BC: Array) -> Array:
    return targets_BC[:, :, None] == jnp.arange(logits_BCV.shape[-1])[None, None, :]


def _statistics(logits_BCV: Array, targets_BC: Array) -> TokenLogps:
    top_BC = jnp.max(logits_BCV, axis=-1)
    normaliser_BC = top_BC + jnp.log(sum_last(jnp.exp(logits_BCV - top_BC[:, :, None])))
    # A masked sum, not a gather: it fuses, and it splits over a sharded vocabulary.
    logps_BC = sum_last(jnp.where(_hits(logits_BCV, targets_BC), logits_BCV, 0.0)) - normaliser_BC
    probs_BCV = jnp.exp(logits_BCV - normaliser_BC[:, :, None])
    entropy_BC = normaliser_BC - sum_last(probs_BCV * logits_BCV)
    mean_logps_BC = sum_last(logits_BCV) / logits_BCV.shape[-1] - normaliser_BC
    # The likeliest token has at least 1 / V: the sum cannot underflow.
    log_collision_BC = jnp.log(sum_last(probs_BCV * probs_BCV))
    return TokenLogps(logps_BC, entropy_BC, normaliser_BC, mean_logps_BC, log_collision_BC)


def _forward(
    hidden_BCD: Array,
    unembed_DV: Array,
    targets_BC: Array,
    temperature: Array,
    used: Array | None,
    config: ModelConfig,
    keep: bool,
) -> tuple[TokenLogps, tuple[Any, ...]]:
    def compute() -> tuple[TokenLogps, Array | None]:
        logits_BCV = _scaled_logits(hidden_BCD, unembed_DV, temperature, config)
        return _statistics(logits_BCV, targets_BC), logits_BCV if keep else None

    out, logits_BCV = _if_used(used, compute)
    return out, (hidden_BCD, unembed_DV, targets_BC, temperature, used, out, logits_BCV)


def _backward(
    config: ModelConfig, keep: bool, residuals: tuple[Any, ...], d: TokenLogps
) -> tuple[Array, Array, None, Array, None]:
    """With p = softmax(l), of each output's gradient with respect to the logits l_v:

    logps `1[v = target] - p`, entropy `-p (l - (logsumexp - entropy))`, logsumexp `p`, mean_logps `1 / V - p`,
    log_collision `2 p (p / sum p^2 - 1)`.
    """
    hidden_BCD, unembed_DV, targets_BC, temperature, used, out, kept_BCV = residuals
    dtype = jnp.dtype(config.compute_dtype)
    over_V = lambda x_BC: x_BC[:, :, None]  # noqa: E731

    def compute() -> tuple[Array, Array, Array]:
        l_BCV = kept_BCV if keep else _scaled_logits(hidden_BCD, unembed_DV, temperature, config)
        V = l_BCV.shape[-1]
        p_BCV = jnp.exp(l_BCV - over_V(out.logsumexp))
        mean = out.logsumexp - out.entropy
        constant = d.logsumexp + d.entropy * mean - d.logps - d.mean_logps - 2.0 * d.log_collision
        squared = 2.0 * d.log_collision * jnp.exp(-out.log_collision)
        d_BCV = p_BCV * (over_V(constant) - over_V(d.entropy) * l_BCV + over_V(squared) * p_BCV)
        d_BCV += jnp.where(_hits(l_BCV, targets_BC), over_V(d.logps), 0.0) + over_V(d.mean_logps) / V
        d_temperature = -jnp.sum(d_BCV * l_BCV) / temperature
        d_RV = (d_BCV / temperature).astype(dtype).reshape(-1, V)
        hidden_RD = hidden_BCD.astype(dtype).reshape(-1, hidden_BCD.shape[-1])
        d_hidden = jnp.matmul(d_RV, unembed_DV.astype(dtype).T, preferred_element_type=jnp.float32)
        d_unembed = jnp.matmul(hidden_RD.T, d_RV, preferred_element_type=jnp.float32)
        d_hidden_BCD = d_hidden.reshape(hidden_BCD.shape).astype(hidden_BCD.dtype)
        return d_hidden_BCD, d_unembed.astype(unembed_DV.dtype), d_temperature

    d_hidden_BCD, d_unembed_DV, d_temperature = _if_used(used, compute)
    return d_hidden_BCD, d_unembed_DV, None, d_temperature, None


def _if_used(used: Array | None, compute: Callable[[], Any]) -> Any:
    """`compute()`, or zeros of its shape where `used` is False."""
    if used is None:
        return compute()
    shapes = jax.eval_shape(compute)
    return jax.lax.cond(used, compute, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))


score_chunk.defvjp(_forward, _backward)
