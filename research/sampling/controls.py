"""Per-token controls: what changes the logits before temperature, top-k and top-p.

The order is transformers': logit bias, repetition penalty, minimum length, allowed tokens. The log-probs of what is
drawn (`sampler_logps`) are those of the distribution after all of them; `policy_logps` stay the plain model's.

Shapes: B rows, V vocabulary, L tokens of context, W = ceil(V / 32) words of a bit mask.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from research.core.errors import ConfigError, DataError
from research.sampling.limits import LOGIT_BIAS, REPETITION_PENALTY, check_number


@dataclasses.dataclass(frozen=True)
class ControlSpec:
    """Which controls are on: static, so that the compiled step holds nothing of the others.

    Attributes:
      logit_bias: add `Controls.logit_bias`.
      repetition_penalty: penalise tokens already seen; the caller then keeps `seen`.
      min_new_tokens: no stop token before that many tokens.
      constrained: only tokens of the `allowed` bit mask; the caller then gets one from the host each step.
    """

    logit_bias: bool = False
    repetition_penalty: bool = False
    min_new_tokens: bool = False
    constrained: bool = False

    @property
    def any(self) -> bool:
        """Whether the logits drawn from differ from the model's."""
        return self != ControlSpec()


class Controls(flax.struct.PyTreeNode):
    """The traced part, so that a sweep over it compiles once. What `ControlSpec` leaves off is not read.

    Attributes:
      logit_bias: `[V]` float32 added to the logits; -inf bans a token; None where off.
      repetition_penalty: float32 scalar above 0; 1 changes nothing, above 1 discourages.
      min_new_tokens: int32 scalar or `[B]`, tokens; the first that many of a completion are no stop tokens.
    """

    logit_bias: Float[Any, " V"] | None
    repetition_penalty: Float[Any, ""]
    min_new_tokens: Int[Any, "*B"]


def make_controls(
    vocab_size: int,
    *,
    stop_tokens: Sequence[int],
    max_new_tokens: int,
    logit_bias: Mapping[int, float] | None = None,
    repetition_penalty: float = 1.0,
    min_new_tokens: int = 0,
    constrained: bool = False,
) -> tuple[ControlSpec, Controls]:
    """Checks the settings of one call; a control at its neutral value is off.

    Args:
      vocab_size: V of the logits.
      stop_tokens: ids that end a completion.
      max_new_tokens: most tokens of a completion.
      logit_bias: token id to what is added to its logit, in `limits.LOGIT_BIAS`; -inf bans it.
      repetition_penalty: in `limits.REPETITION_PENALTY`; 1 is off.
      min_new_tokens: tokens before a stop token may be drawn.
      constrained: rows come with `allowed` masks.

    Raises:
      ConfigError: a value out of range, or one that would have no effect.
    """
    biases = dict(logit_bias or {})
    for token, bias in biases.items():
        if not 0 <= token < vocab_size:
            raise ConfigError(f"logit_bias: got token {token}, expected 0 to {vocab_size - 1} in this vocabulary.")
        if bias != -math.inf:
            check_number(f"logit_bias: token {token}", bias, LOGIT_BIAS, other="-inf (banned) or ")
    check_number("repetition_penalty", repetition_penalty, REPETITION_PENALTY, other="1 (off) or ")
    if not 0 <= min_new_tokens < max_new_tokens:
        raise ConfigError(
            f"min_new_tokens: got {min_new_tokens}, expected 0 to {max_new_tokens - 1}, "
            f"because a stop token must fit into max_new_tokens {max_new_tokens}."
        )
    if min_new_tokens and not stop_tokens:
        raise ConfigError(
            f"min_new_tokens: got {min_new_tokens}, expected 0, because without stop tokens "
            "every completion has max_new_tokens."
        )
    spec = ControlSpec(bool(biases), repetition_penalty != 1.0, min_new_tokens > 0, constrained)
    table = np.zeros(vocab_size, np.float32)
    table[list(biases)] = list(biases.values())
    return spec, Controls(table if spec.logit_bias else None, np.float32(repetition_penalty), np.int32(min_new_tokens))


def control_logits(
    logits_BV: Float[Array, "B V"],
    spec: ControlSpec,
    controls: Controls,
    *,
    seen: Bool[Array, "B V"] | None = None,
    drawn: Int[Array, "*B"] | None = None,
    stop_tokens: tuple[int, ...] = (),
    allowed: Int[Array, "B W"] | None = None,
) -> Float[Array, "B V"]:
    """The logits to draw from; temperature, top-k and top-p come after.

    1. `l_v + bias_v`
    2. `l_v / penalty if l_v > 0 else l_v * penalty` for tokens seen (Keskar et al. 2019, section 4.1, with the
       sign rule of transformers, so that a negative logit falls too)
    3. -inf for stop tokens in rows of fewer than `min_new_tokens` tokens
    4. -inf for tokens whose bit is not set

    A row can lose all of its tokens: each of them -inf. `sample_token` marks it by a `sampler_logp` of -inf, and
    `refuse_empty_rows` turns the mark into an error; `ConstraintRows.masks` never gives an empty mask.

    Args:
      logits_BV: the model's.
      spec: static.
      controls: traced.
      seen: tokens of the prompt or of the completion so far (`seen_tokens`, `mark_seen`); for the penalty.
      drawn: completion tokens drawn so far, scalar or one a row; for `min_new_tokens`.
      stop_tokens: static.
      allowed: bit v % 32 of word v // 32 allows token v; for `constrained`.

    Raises:
      ValueError: an argument that a control in `spec` reads is None.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    V = logits_BV.shape[-1]
    if spec.logit_bias:
        logits_BV = logits_BV + _given(controls.logit_bias, "controls.logit_bias")[None, :]
    if spec.repetition_penalty:
        penalty = controls.repetition_penalty
        penalised = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(_given(seen, "seen"), penalised, logits_BV)
    if spec.min_new_tokens:
        short = jnp.reshape(_given(drawn, "drawn") < controls.min_new_tokens, (-1, 1))
        stops = jnp.isin(jnp.arange(V), jnp.asarray(stop_tokens, jnp.int32))[None, :]
        logits_BV = jnp.where(short & stops, -jnp.inf, logits_BV)
    if spec.constrained:
        logits_BV = jnp.where(unpack_mask(_given(allowed, "allowed"), V), logits_BV, -jnp.inf)
    return logits_BV


def _given(value: Array | None, name: str) -> Array:
    if value is None:
        raise ValueError(f"control_logits: {name} is None, but a control that is on reads it.")
    return value


def unpack_mask(allowed_BW: Int[Array, "B W"], vocab_size: int) -> Bool[Array, "B V"]:
    """True where bit v % 32 of word v // 32 is set; int32 or uint32 words."""
    shifts = jnp.arange(32, dtype=allowed_BW.dtype)[None, None, :]
    bits = (allowed_BW[:, :, None] >> shifts) & 1
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


def refuse_empty_rows(sampler_logps_BN: np.ndarray, names: Sequence[str]) -> None:
    """Host side: DataError if some row had no token left to draw (a `sampler_logp` of -inf).

    Args:
      sampler_logps_BN: `[B, N]`, 0 after a completion's end.
      names: how to call each row.
    """
    empty = np.argwhere(np.isneginf(np.asarray(sampler_logps_BN)))
    if len(empty):
        row, place = empty[0]
        raise DataError(
            f"{names[row]}: no token was left to draw at completion token {place}: logit_bias, min_new_tokens "
            "and the constraint together removed all of them."
        )
