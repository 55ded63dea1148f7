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
from research.sampling.controls import NO_CONTROLS, Controls, control_logits, mark_seen
from research.sampling.methods import sample_token
from research.sampling.types import SamplerScalars, SamplerSpec

COMPILER_OPTIONS = decoding_options()
"""Of programs that run these steps."""


class Slots(flax.struct.PyTreeNode):
    """Everything between two decode steps."""

    cache: KVCache  # holds all tokens of each row but its last
    last: Int[Array, " B"]  # the token to feed next
    positions: Int[Array, " B"]  # position of `last`
    drawn: Int[Array, " B"]  # completion tokens so far, forced ones included; with `keys` it keys the next draw
    limits: Int[Array, " B"]  # completion tokens at most
    live: Bool[Array, " B"]  # rows that are not finished
    keys: Array  # one key a row
    forced: Int[Array, "B M"]  # tokens that are fed instead of drawn ones; M is 0 where nothing is forced
    forced_left: Int[Array, " B"]  # how many of the last entries of `forced` are still to be fed
    # tokens of the prompt and the completion; None unless the repetition penalty is on
    seen: Bool[Array, "B V"] | None = None
    # bit mask of the tokens that may be drawn next; None unless rows are constrained
    allowed: Int[Array, "B W"] | None = None


class Chunk(flax.struct.PyTreeNode):
    """The tokens of C decode steps."""

    tokens: Int[Array, "C B"]  # undefined where `active` is False
    active: Bool[Array, "C B"]  # the row was not finished before this step
    drawn: Bool[Array, "C B"]  # and its token was drawn, not forced
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
    controls: Controls = NO_CONTROLS,
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
      scalars, controls, config, spec: as `sampler.sample` takes them.
      free_slots: return once this many slots are free; a value above B disables the check.
      max_steps: at most C, which is `steps`; 1 where rows are constrained, because the host makes each mask.
      sync_every: decode steps between host syncs that check which sequences are unfinished.
    """
    B, M = slots.forced.shape
    unembed_DV = unembedding(params)
    stops = jnp.asarray(spec.stop_tokens, jnp.int32)
    zeros, nothing = jnp.zeros((steps, B), jnp.float32), jnp.zeros((steps, B), bool)
    empty = Chunk(jnp.zeros((steps, B), jnp.int32), nothing, nothing, zeros, zeros)
    limit = jnp.minimum(max_steps, steps)
    controlled = slots.allowed is not None or bool(jax.tree.leaves(controls))

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
        changed = control_logits(
            logits, controls, seen=slots.seen, drawn=slots.drawn, stop_tokens=spec.stop_tokens, allowed=slots.allowed
        )
        found = sample_token(
            logits,
            spec.method,
            scalars.temperature,
            scalars.top_p,
            jax.vmap(jax.random.fold_in)(slots.keys, slots.drawn),
            controlled_BV=changed if controlled else None,
        )
        token = found.tokens
        ended = jnp.any(token[:, None] == stops[None, :], axis=1)
        forced = jnp.zeros_like(live)
        if M:
            forced, at = slots.forced_left > 0, jnp.clip(M - slots.forced_left, 0, M - 1)
            token = jnp.where(forced, jnp.take_along_axis(slots.forced, at[:, None], axis=1)[:, 0], token)
            ended = ended & ~forced
        drawn = slots.drawn + live
        new = Chunk(token, live, live & ~forced, found.sampler_logps, found.policy_logps)
        slots = slots.replace(
            cache=cache,
            last=jnp.where(live, token, slots.last),
            positions=slots.positions + live,
            drawn=drawn,
            live=live & ~ended & (drawn < slots.limits),
            forced_left=slots.forced_left - forced * live,
            seen=None if slots.seen is None else mark_seen(slots.seen, token),
        )
        put = lambda buffer, row: jax.lax.dynamic_update_slice(buffer, row[None], (t, 0))  # noqa: E731
        return t + 1, slots, jax.tree.map(put, chunk, new)

    def steps_until_sync(carry: tuple[Array, Slots, Chunk]) -> tuple[Array, Slots, Chunk]:
        end = jnp.minimum(carry[0] + sync_every, limit)
        return jax.lax.while_loop(lambda inner: inner[0] < end, step, carry)

    body = step if sync_every == 1 else steps_until_sync
    slots = slots.replace(cache=slots.cache.squeezed())
    _, slots, chunk = jax.lax.while_loop(unfinished, body, (jnp.int32(0), slots, empty))
    return slots.replace(cache=slots.cache.unsqueezed()), chunk
