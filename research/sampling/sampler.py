"""The jitted sampler: all prompts in one batch, one pure function from parameters to completions, and its steps.

`research.sampling.engine` draws the same completions with fewer slots than rows. A prompt's last token is not
prefilled but fed in the first decode step, so that every token is drawn in one place, and prompts need no logits.

Shapes: P prompts, G samples a prompt, B = P * G rows [p1, p1, ..., p2, p2], L prompt slots, N completion slots;
R prompts prefilled together, C decode steps, M forced tokens, V vocabulary, W words of a bit mask.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.axes import batch_ways
from models.config import ModelConfig
from models.decode.cache import KVCache, init_cache
from models.decode.rows import insert_rows, resize, with_prefix
from models.groups import groups_split
from models.softmax import compute_logits
from models.transformer import Params, forward_cached, unembedding
from research.core.cpu import decoding_options
from research.sampling.controls import NO_CONTROLS, Controls, control_logits, mark_seen, seen_tokens
from research.sampling.methods import row_keys, sample_token
from research.sampling.types import STOPPED, TRUNCATED, Completions, Prompts, SamplerScalars, SamplerSpec
from research.sampling.weights import sampling_params

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


@partial(jax.jit, static_argnames=("config", "spec"), compiler_options=COMPILER_OPTIONS)
def sample(
    params: Params,
    prompts: Prompts,
    scalars: SamplerScalars,
    controls: Controls = NO_CONTROLS,
    *,
    config: ModelConfig,
    spec: SamplerSpec,
) -> Completions:
    """Draws G completions of each prompt: P * G rows, the G of one prompt adjacent.

    `params` are as trained or laid out for decoding. What is traced: `scalars` (seed, step, temperature, top_p) and
    `controls` (logit bias, repetition penalty, minimum length); `config` and `spec` are static.
    """
    params = sampling_params(params, config, spec.weights)
    slots = start(params, prompts, scalars, config=config, spec=spec, share=True)
    if controls.repetition_penalty is not None:
        seen = seen_tokens(prompts.tokens, prompts.mask, config.vocab_size)
        slots = slots.replace(seen=jnp.repeat(seen, spec.samples_per_prompt, axis=0))
    chunks, N = [], spec.max_new_tokens
    sync_every = 8 if batch_ways(jax.sharding.get_abstract_mesh()) > 1 else 1
    never = jnp.int32(slots.live.shape[0] + 1)
    # A new row's cache ends before its last token, so N slots hold that one and all of the completion but its end.
    for done in range(0, N, spec.cache_bucket):
        steps = min(spec.cache_bucket, N - done)
        slots = slots.replace(cache=resize(slots.cache, slots.cache.slots + steps))
        slots, chunk = decode(
            params,
            slots,
            scalars,
            never,
            jnp.int32(steps),
            controls,
            steps=steps,
            config=config,
            spec=spec,
            sync_every=sync_every,
        )
        chunks.append(chunk)
    whole: Chunk = jax.tree.map(lambda *parts: jnp.concatenate(parts).T, *chunks)
    return completions(whole.tokens, whole.active, whole.sampler_logps, whole.policy_logps, spec)


def start(
    params: Params,
    prompts: Prompts,
    scalars: SamplerScalars,
    *,
    config: ModelConfig,
    spec: SamplerSpec,
    share: bool = False,
) -> Slots:
    """All rows of a rollout in slots, nothing drawn yet; the cache is full.

    `share` keeps a prompt once for all rows of its group, which then read it in one product at every step: where a
    group has several, none is on two devices, and not in an int8 cache, which keeps each row's own.
    """
    P, L = prompts.tokens.shape
    G = spec.samples_per_prompt
    B = P * G
    filled = prefill(params, prompts.tokens[:, :-1], prompts.mask[:, :-1], config)
    rows = jnp.arange(B, dtype=jnp.int32)
    if share and G > 1 and not spec.int8_cache and groups_split(B, G):
        cache = with_prefix(init_cache(config, B, 0), filled)
    else:
        cache = init_cache(config, B, L - 1, int8=spec.int8_cache).replace(length=jnp.int32(L - 1))
        cache = insert_rows(cache, filled, rows, rows // G)
    zeros = jnp.zeros((B,), jnp.int32)
    return Slots(
        cache=cache,
        last=jnp.repeat(prompts.tokens[:, -1], G),
        positions=jnp.repeat(jnp.sum(prompts.mask, axis=1, dtype=jnp.int32) - 1, G),
        drawn=zeros,
        limits=jnp.full((B,), spec.max_new_tokens, jnp.int32),
        live=jnp.ones((B,), bool),
        keys=row_keys(scalars.seed, scalars.step, jnp.repeat(prompts.prompt_ids, G), rows % G),
        forced=jnp.zeros((B, 0), jnp.int32),
        forced_left=zeros,
    )


def completions(
    tokens_BN: Int[Array, "B N"],
    mask_BN: Bool[Array, "B N"],
    sampler_logps_BN: Float[Array, "B N"],
    policy_logps_BN: Float[Array, "B N"],
    spec: SamplerSpec,
) -> Completions:
    """Completions of rows of drawn tokens, whatever stands where the mask is False."""
    lengths = jnp.sum(mask_BN, axis=1, dtype=jnp.int32)
    tokens = jnp.where(mask_BN, tokens_BN, spec.pad_id)
    last = jnp.take_along_axis(tokens, jnp.maximum(lengths - 1, 0)[:, None], axis=1)
    stopped = jnp.any(last == jnp.asarray(spec.stop_tokens, jnp.int32)[None, :], axis=1)
    sampler_logps, policy_logps = (jnp.where(mask_BN, logps, 0.0) for logps in (sampler_logps_BN, policy_logps_BN))
    reason = jnp.where(stopped, STOPPED, TRUNCATED).astype(jnp.int32)
    return Completions(tokens, mask_BN, sampler_logps, policy_logps, reason, lengths)


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
