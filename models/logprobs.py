"""The one function that turns hidden states into token log-probs and entropy, a time chunk at a time.

Shapes: B batch, T time, D model, V vocabulary. `[B, T, V]` never exists: logits of one chunk of
`logprob_chunk` positions do, and the backward pass recomputes them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.axes import constrain
from models.config import ModelConfig
from models.transformer import Params, forward, unembedding


class TokenLogps(NamedTuple):
    """Per-token quantities, float32, nats; `x[b, t]` speaks of `tokens[b, t]` given the tokens before it.

    Attributes:
      logps: `[B, T]` log-probability of the token; 0 at t = 0, which nothing predicts.
      entropy: `[B, T]` entropy of the distribution that the token was predicted from; 0 at t = 0.
      logsumexp: `[B, T]` log-normaliser (for the z-loss).
      mean_logps: `[B, T]` mean over the vocabulary of the log-probs (for label smoothing).
    """

    logps: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    logsumexp: Float[Array, "B T"]
    mean_logps: Float[Array, "B T"]


def compute_logits(
    hidden: Float[Array, "... D"], unembed_DV: Float[Array, "D V"], config: ModelConfig
) -> Float[Array, "... V"]:
    """Float32 logits; the product runs in the compute dtype."""
    compute = jnp.dtype(config.compute_dtype)
    flat = hidden.astype(compute).reshape(-1, hidden.shape[-1])
    logits = jnp.matmul(flat, unembed_DV.astype(compute), preferred_element_type=jnp.float32)
    return logits.reshape(*hidden.shape[:-1], -1)


def hidden_logps(
    hidden_BTD: Float[Array, "B T D"],
    unembed_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    config: ModelConfig,
    *,
    temperature: float | Float[Array, ""] = 1.0,
) -> TokenLogps:
    """Log-probs of `targets[b, t]` under the logits at hidden state `[b, t]` divided by `temperature`.

    Args:
      hidden_BTD: states after the final norm.
      unembed_DV: read-out matrix.
      targets_BT: int32 token to score at each state.
      config: gives the chunk length and the compute dtype.
      temperature: divides the logits, exactly as it did when sampling; traced.
    """
    B, T, _ = hidden_BTD.shape
    chunk = min(config.logprob_chunk, T)
    padded = -T % chunk
    hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, padded), (0, 0)))
    targets_BT = jnp.pad(targets_BT, ((0, 0), (0, padded)))

    @jax.checkpoint
    def score(hidden: Array, targets: Array) -> TokenLogps:
        logits = compute_logits(hidden, unembed_DV, config) / temperature
        logits = constrain(logits, "batch", "length", "activation_vocab")
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        # A masked sum, not a gather: it fuses, and it splits over a sharded vocabulary.
        hit = targets[:, :, None] == jnp.arange(logits.shape[-1])[None, None, :]
        logps = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1) - normaliser
        probs = jnp.exp(logits - normaliser[:, :, None])
        entropy = normaliser - jnp.sum(probs * logits, axis=-1)
        return TokenLogps(logps, entropy, normaliser, jnp.mean(logits, axis=-1) - normaliser)

    if chunk == T:
        return score(hidden_BTD, targets_BT)
    split = lambda x: x.reshape(B, -1, chunk, *x.shape[2:]).swapaxes(0, 1)  # noqa: E731
    chunks = jax.lax.map(lambda args: score(*args), (split(hidden_BTD), split(targets_BT)))
    return TokenLogps(*(x.swapaxes(0, 1).reshape(B, -1)[:, :T] for x in chunks))


def token_logps(
    params: Params,
    config: ModelConfig,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
) -> TokenLogps:
    """Teacher-forced log-probs of every token of a batch, aligned with the tokens."""
    hidden = forward(params, config, tokens_BT, positions_BT, segment_ids_BT)
    shifted = hidden_logps(
        hidden, unembedding(params, config), jnp.roll(tokens_BT, -1, axis=1), config, temperature=temperature
    )
    return TokenLogps(*(jnp.pad(x[:, :-1], ((0, 0), (1, 0))) for x in shifted))
