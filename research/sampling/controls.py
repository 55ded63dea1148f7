"""Per-token controls: what changes the logits before temperature, top-k and top-p.

The order is transformers': logit bias, repetition penalty, minimum length, allowed tokens. The log-probs of what is
drawn (`sampler_logps`) are those of the distribution after all of them; `policy_logps` stay the plain model's.

Shapes: B rows, V vocabulary, L tokens of context, W = ceil(V / 32) words of a bit mask.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from research.config.schema import expect
from research.core.errors import ConfigError
from research.sampling.limits import LOGIT_BIAS, REPETITION_PENALTY, check_number


class Controls(flax.struct.PyTreeNode):
    """Traced numbers, so that a sweep over them compiles once; None is off and leaves nothing in the compiled step."""

    logit_bias: Float[Any, " V"] | None = None  # added to the logits; -inf bans a token
    repetition_penalty: Float[Any, ""] | None = None  # above 1 discourages tokens already seen
    min_new_tokens: Int[Any, ""] | None = None  # no stop token is among the first that many of a completion


NO_CONTROLS = Controls()


def make_controls(
    vocab_size: int,
    *,
    max_new_tokens: int,
    logit_bias: Mapping[int, float] | None = None,
    repetition_penalty: float = 1.0,
    min_new_tokens: int = 0,
) -> Controls:
    """Checks the settings of one call; a control at its neutral value (penalty 1, no bias, no minimum) is off.

    Raises:
      ConfigError: a value out of range (`limits`; a bias may be -inf, which bans a token).
    """
    biases = dict(logit_bias or {})
    for token, bias in biases.items():
        if not 0 <= token < vocab_size:
            raise ConfigError(f"logit_bias: got token {token}, expected 0 to {vocab_size - 1} in this vocabulary.")
        if bias != -math.inf:
            check_number(f"logit_bias: token {token}", bias, LOGIT_BIAS, other="-inf (banned) or ")
    check_number("repetition_penalty", repetition_penalty, REPETITION_PENALTY, other="1 (off) or ")
    most = f"0 to {max_new_tokens - 1}, because a stop token must fit into max_new_tokens {max_new_tokens}"
    expect(0 <= min_new_tokens < max_new_tokens, "min_new_tokens", min_new_tokens, most)
    table = np.zeros(vocab_size, np.float32)
    table[list(biases)] = list(biases.values())
    return Controls(
        table if biases else None,
        np.float32(repetition_penalty) if repetition_penalty != 1.0 else None,
        np.int32(min_new_tokens) if min_new_tokens else None,
    )


def control_logits(
    logits_BV: Float[Array, "B V"],
    controls: Controls,
    *,
    seen: Bool[Array, "B V"] | None = None,
    drawn: Int[Array, " B"] | None = None,
    stop_tokens: tuple[int, ...] = (),
    allowed: Int[Array, "B W"] | None = None,
) -> Float[Array, "B V"]:
    """The logits to draw from; temperature, top-k and top-p come after.

    1. `l_v + bias_v`
    2. `l_v / penalty if l_v > 0 else l_v * penalty` for tokens seen (Keskar et al. 2019, section 4.1, with the
       sign rule of transformers, so that a negative logit falls too)
    3. -inf for stop tokens in rows of fewer than `min_new_tokens` tokens
    4. -inf for tokens whose bit is not set

    A row can lose all of its tokens: each of them -inf. `sample_token` marks it by a `sampler_logp` of -inf, which the
    engine turns into an error; `Grammars.masks` never gives an empty mask.

    Args:
      logits_BV: the model's.
      controls: those that are on.
      seen: tokens of the prompt or of the completion so far (`seen_tokens`, `mark_seen`); for the penalty.
      drawn: completion tokens drawn so far; for `min_new_tokens`, with `stop_tokens`.
      allowed: bit v % 32 of word v // 32 allows token v; None allows all.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    V = logits_BV.shape[-1]
    if controls.logit_bias is not None:
        logits_BV = logits_BV + controls.logit_bias[None, :]
    if controls.repetition_penalty is not None:
        assert seen is not None
        penalty = controls.repetition_penalty
        penalised = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen, penalised, logits_BV)
    if controls.min_new_tokens is not None:
        assert drawn is not None
        stops = jnp.isin(jnp.arange(V), jnp.asarray(stop_tokens, jnp.int32))[None, :]
        logits_BV = jnp.where((drawn < controls.min_new_tokens)[:, None] & stops, -jnp.inf, logits_BV)
    if allowed is not None:
        logits_BV = jnp.where(unpack_mask(allowed, V), logits_BV, -jnp.inf)
    return logits_BV


def unpack_mask(allowed_BW: Int[Array, "B W"], vocab_size: int) -> Bool[Array, "B V"]:
    """True where bit v % 32 of word v // 32 is set."""
    bits = (allowed_BW[:, :, None] >> jnp.arange(32, dtype=allowed_BW.dtype)[None, None, :]) & 1
    return bits.reshape(allowed_BW.shape[0], -1)[:, :vocab_size] == 1


def seen_tokens(tokens_BL: Int[Array, "B L"], mask_BL: Bool[Array, "B L"], vocab_size: int) -> Bool[Array, "B V"]:
    """True on the real tokens of each row; padding does not count."""
    rows = jnp.arange(tokens_BL.shape[0])[:, None]
    seen = jnp.zeros((tokens_BL.shape[0], vocab_size), bool)
    # An index past the end is dropped.
    return seen.at[rows, jnp.where(mask_BL, tokens_BL, vocab_size)].set(True, mode="drop")


def mark_seen(seen_BV: Bool[Array, "B V"], tokens_B: Int[Array, " B"]) -> Bool[Array, "B V"]:
    """Adds the token that each row has just drawn."""
    return seen_BV.at[jnp.arange(tokens_B.shape[0]), tokens_B].set(True)
