"""The steps of sampling as pure functions: prompts into a cache, rows into slots, tokens out of them.

A prompt's last token is not prefilled but fed in the first decode step, so that every token is drawn in one
place, and prompts need no logits.

Shapes: B slots, R prompts prefilled together, L prompt slots, C decode steps, M forced tokens, V vocabulary.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.config import ModelConfig
from models.decode.cache import KVCache, init_cache
from models.decode.rows import with_prefix
from models.softmax import compute_logits
from models.transformer import Params, forward_cached, unembedding
from research.core.cpu import decoding_options
from research.sampling.controls import Controls, control_logits, mark_seen
from research.sampling.methods import sample_token
from research.sampling.types import SamplerScalars, SamplerSpec

COMPILER_OPTIONS = decoding_options()
"""Of programs that run these steps."""


class Slots(flax.struct.PyTreeNode):
    """Everything between two decode steps.

    Attributes:
      cache: holds all tokens of each row but its last.
      last: `[B]` int32, the token to feed next.
      positions: `[B]` int32, position of `last`.
      drawn: `[B]` int32, completion tokens so far, forced ones included; with `keys` it keys the next draw.
      limits: `[B]` int32, completion tokens at most.
      live: `[B]` bool, rows that are not finished.
      keys: `[B]` one key a row.
      forced: `[B, M]` int32, tokens that are fed instead of drawn ones; M is 0 where nothing is forced.
      forced_left: `[B]` int32, how many of the last entries of `forced` are still to be fed.
      seen: `[B, V]` bool, tokens of the prompt and the completion; None unless the repetition penalty is on.
      allowed: `[B, W]` int32, bit mask of the tokens that may be drawn next; None unless rows are constrained.
    """

    cache: KVCache
    last: Int[Array, " B"]
    positions: Int[Array, " B"]
    drawn: Int[Array, " B"]
    limits: Int[Array, " B"]
    live: Bool[Array, " B"]
    keys: Array
    forced: Int[Array, "B M"]
    forced_left: Int[Array, " B"]
    seen: Bool[Array, "B V"] | None = None
    allowed: Int[Array, "B W"] | None = None


class Chunk(flax.struct.PyTreeNode):
    """The tokens of C decode steps.

    Attributes:
      tokens: `[C, B]` int32; undefined where `active` is False.
      active: `[C, B]` bool, the row was not finished before this step.
      drawn: `[C, B]` bool, and its token was drawn, not forced.
      sampler_logps, policy_logps: `[C, B]` float32.
    """

    tokens: Int[Array, "C B"]
    active: Bool[Array, "C B"]
    drawn: Bool[Array, "C B"]
    sampler_logps: Float[Array, "C B"]
    policy_logps: Float[Array, "C B"]


def prefill(
    params: Params,
    tokens_RL: Int[Array, "R L"],
    mask_RL: Bool[Array, "R L"],
    config: ModelConfig,
    prefix: KVCache | None = None,
) -> KVCache:
    """A full cache of left-padded prompts, behind a prefix that they share."""
    R, L = tokens_RL.shape
    cache = with_prefix(init_cache(config, R, L), prefix)
    if not L:
        return cache
    segment_ids = mask_RL.astype(jnp.int32)
    before = 0 if prefix is None else prefix.slots
    positions = before + jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
    return forward_cached(params, config, tokens_RL, positions, segment_ids, cache)[1]


def decode(
    params: Params,
    slots: Slots,
    scalars: SamplerScalars,
    free_slots: Int[Array, ""],
    max_steps: Int[Array, ""],
    controls: Controls | None = None,
    *,
    steps: int,
    config: ModelConfig,
    spec: SamplerSpec,
    sync_every: int = 1,
) -> tuple[Slots, Chunk]:
    """Up to `max_steps` tokens a row; returns sooner when no row is live, or when enough slots are free.

    Args:
      params: as `models.decode.layout.decode_params` lays them out, or as trained.
      slots: the cache has room for `max_steps` more.
      scalars: traced numbers of the rollout.
      free_slots: return once this many slots are free; a value above B disables the check.
      max_steps: at most C; 1 where rows are constrained, because the host makes each mask.
      controls: numbers of `spec.controls`; None where it is empty.
      steps: C.
      config: of the model.
      spec: of the rollout.
      sync_every: decode steps between host syncs that check which sequences are unfinished.
    """
    B = slots.last.shape[0]
    unembed_DV = unembedding(params)
    stops = jnp.asarray(spec.stop_tokens, jnp.int32)
    zeros = jnp.zeros((steps, B), jnp.float32)
    nothing = jnp.zeros((steps, B), bool)
    empty = Chunk(jnp.zeros((steps, B), jnp.int32), nothing, nothing, zeros, zeros)
    M = slots.forced.shape[1]
    limit = jnp.minimum(max_steps, steps)

    def unfinished(carry: tuple[Array, Slots, Chunk]) -> Array:
        t, slots, _ = carry
        free = B - jnp.sum(slots.live)
        return (t < limit) & (free < B) & (free < free_slots)

    def step(carry: tuple[Array, Slots, Chunk]) -> tuple[Array, Slots, Chunk]:
        t, slots, chunk = carry
        live = slots.live
        hidden, cache = forward_cached(
            params, config, slots.last[:, None], slots.positions[:, None], live[:, None].astype(jnp.int32), slots.cache
        )
        logits = compute_logits(hidden[:, 0], unembed_DV, config)
        controlled = None
        if controls is not None:
            controlled = control_logits(
                logits,
                spec.controls,
                controls,
                seen=slots.seen,
                drawn=slots.drawn,
                stop_tokens=spec.stop_tokens,
                allowed=slots.allowed,
            )
        found = sample_token(
            logits,
            spec.method,
            scalars.temperature,
            scalars.top_p,
            jax.vmap(jax.random.fold_in)(slots.keys, slots.drawn),
            controlled_BV=controlled,
        )
        token = found.tokens
        ended = jnp.any(token[:, None] == stops[None, :], axis=1)
        forced = jnp.zeros_like(live)
        if M:
            forced, at = slots.forced_left > 0, jnp.clip(M - slots.forced_left, 0, M - 1)
            token = jnp.where(forced, jnp.take_along_axis(slots.forced, at[:, None], axis=1)[:, 0], token)
            ended = ended & ~forced
        drawn = slots.drawn + live
        put = lambda buffer, row: jax.lax.dynamic_update_slice(buffer, row[None], (t, 0))  # noqa: E731
        chunk = Chunk(
            tokens=put(chunk.tokens, token),
            active=put(chunk.active, live),
            drawn=put(chunk.drawn, live & ~forced),
            sampler_logps=put(chunk.sampler_logps, found.sampler_logps),
            policy_logps=put(chunk.policy_logps, found.policy_logps),
        )
        slots = slots.replace(
            cache=cache,
            last=jnp.where(live, token, slots.last),
            positions=slots.positions + live,
            drawn=drawn,
            live=live & ~ended & (drawn < slots.limits),
            forced_left=slots.forced_left - forced * live,
            seen=None if slots.seen is None else mark_seen(slots.seen, token),
        )
        return t + 1, slots, chunk

    def steps_until_sync(carry: tuple[Array, Slots, Chunk]) -> tuple[Array, Slots, Chunk]:
        end = jnp.minimum(carry[0] + sync_every, limit)
        return jax.lax.while_loop(lambda inner: inner[0] < end, step, carry)

    body = step if sync_every == 1 else steps_until_sync
    slots = slots.replace(cache=slots.cache.squeezed())
    _, slots, chunk = jax.lax.while_loop(unfinished, body, (jnp.int32(0), slots, empty))
    return slots.replace(cache=slots.cache.unsqueezed()), chunk
