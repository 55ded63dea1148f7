"""The jitted sampler: all prompts in one batch, one pure function from parameters to completions.

`research.sampling.engine` draws the same completions with fewer slots than rows.

Shapes: P prompts, G samples a prompt, B = P * G rows laid out [p1, p1, ..., p2, p2], L prompt slots,
N completion slots.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.axes import batch_ways
from models.config import ModelConfig
from models.decode.cache import init_cache
from models.decode.rows import insert_rows, resize, with_prefix
from models.groups import groups_split
from models.transformer import Params
from research.sampling.controls import NO_CONTROLS, Controls, seen_tokens
from research.sampling.decode import COMPILER_OPTIONS, Chunk, Slots, decode, prefill
from research.sampling.methods import row_keys
from research.sampling.types import STOPPED, TRUNCATED, Completions, Prompts, SamplerScalars, SamplerSpec
from research.sampling.weights import sampling_params


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
