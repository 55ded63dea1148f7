"""The jitted sampler: prefill left-padded prompts, then decode in one `while_loop` until all rows stop.

Shapes: P prompts, G samples a prompt, B = P * G rows laid out [p1, p1, ..., p2, p2], L prompt slots,
N completion slots, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.cache import KVCache, init_cache, repeat_rows
from models.config import ModelConfig
from models.logprobs import compute_logits
from models.transformer import Params, forward_cached, unembedding, unstack_layers
from research.sampling.methods import SamplingMethod, draw, row_keys, sampling_logps

STOPPED, TRUNCATED = 1, 0
"""Stop reasons: a stop token was drawn; the completion reached `max_new_tokens`."""


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
    """The static part of a rollout.

    Attributes:
      max_new_tokens: N, completion slots.
      samples_per_prompt: G; a prompt is prefilled once for its whole group.
      stop_tokens: token ids that end a completion; they are part of it.
      pad_id: fills the slots after the end; never looked at to find a mask.
      method: greedy, temperature, top-k, top-p.
    """

    max_new_tokens: int
    samples_per_prompt: int
    stop_tokens: tuple[int, ...]
    pad_id: int
    method: SamplingMethod = SamplingMethod()


class SamplerScalars(flax.struct.PyTreeNode):
    """The traced part of a rollout, so that a sweep over it compiles once."""

    seed: Int[Any, ""]
    step: Int[Any, ""]
    temperature: Float[Any, ""]
    top_p: Float[Any, ""]


class Prompts(flax.struct.PyTreeNode):
    """Left-padded prompts.

    Attributes:
      tokens: `[P, L]` int32.
      mask: `[P, L]` bool, True on real tokens.
      prompt_ids: `[P]` int32, a stable id of each prompt; it keys the randomness.
    """

    tokens: Int[Any, "P L"]
    mask: Bool[Any, "P L"]
    prompt_ids: Int[Any, " P"]


class Completions(flax.struct.PyTreeNode):
    """What was sampled, B = P * G rows.

    Attributes:
      tokens: `[B, N]` int32, `pad_id` after the end.
      mask: `[B, N]` bool, True up to and with the first stop token.
      sampler_logps: `[B, N]` float32, under the distribution that was drawn from.
      policy_logps: `[B, N]` float32, under the plain model (temperature 1, nothing removed).
      stop_reason: `[B]` int32, STOPPED or TRUNCATED.
      lengths: `[B]` int32, tokens in the completion, the stop token included.
    """

    tokens: Int[Any, "B N"]
    mask: Bool[Any, "B N"]
    sampler_logps: Float[Any, "B N"]
    policy_logps: Float[Any, "B N"]
    stop_reason: Int[Any, " B"]
    lengths: Int[Any, " B"]


class DecodeState(flax.struct.PyTreeNode):
    """Everything between two decode steps.

    Attributes:
      t: int32 scalar, completion tokens drawn so far, at least 1.
      cache: the KV cache; holds the prompt and all drawn tokens but the last.
      last: `[B]` int32, the token drawn last, not yet fed back.
      positions: `[B]` int32, position of `last`.
      done: `[B]` bool.
      keys: `[B]` one key a row.
      tokens, sampler_logps, policy_logps: `[B, N]` outputs so far.
      lengths: `[B]` int32.
    """

    t: Int[Array, ""]
    cache: KVCache
    last: Int[Array, " B"]
    positions: Int[Array, " B"]
    done: Bool[Array, " B"]
    keys: Array
    tokens: Int[Array, "B N"]
    sampler_logps: Float[Array, "B N"]
    policy_logps: Float[Array, "B N"]
    lengths: Int[Array, " B"]


@partial(jax.jit, static_argnames=("config", "spec"))
def sample(
    params: Params, prompts: Prompts, scalars: SamplerScalars, *, config: ModelConfig, spec: SamplerSpec
) -> Completions:
    """Draws G completions of each prompt.

    Args:
      params: the model's parameters.
      prompts: left-padded prompts.
      scalars: seed, step, temperature, top_p; traced.
      config: static model description.
      spec: static rollout description.

    Returns:
      Completions of P * G rows, the G of one prompt adjacent.
    """
    params = unstack_layers(params, config)
    state = _prefill(params, prompts, scalars, config, spec)
    return _completions(_decode(params, state, scalars, jnp.int32(spec.max_new_tokens), config, spec))


def sample_stream(
    params: Params, prompts: Prompts, scalars: SamplerScalars, *, config: ModelConfig, spec: SamplerSpec
) -> Iterator[Completions]:
    """The same completions as `sample`, yielded after every token: for a terminal."""
    # Copies, because `decode` takes the state's buffers for itself.
    shown = lambda state: jax.tree.map(jnp.copy, _completions(state))  # noqa: E731
    state = prefill(params, prompts, scalars, config=config, spec=spec)
    yield shown(state)
    for t in range(2, spec.max_new_tokens + 1):
        if bool(state.done.all()):
            return
        state = decode(params, state, scalars, jnp.int32(t), config=config, spec=spec)
        yield shown(state)


@partial(jax.jit, static_argnames=("config", "spec"))
def prefill(
    params: Params, prompts: Prompts, scalars: SamplerScalars, *, config: ModelConfig, spec: SamplerSpec
) -> DecodeState:
    """Runs the prompts through the model and draws each row's first token."""
    return _prefill(params, prompts, scalars, config, spec)


@partial(jax.jit, static_argnames=("config", "spec"), donate_argnames=("state",))
def decode(
    params: Params,
    state: DecodeState,
    scalars: SamplerScalars,
    until: Int[Array, ""],
    *,
    config: ModelConfig,
    spec: SamplerSpec,
) -> DecodeState:
    """Decodes until `until` tokens have been drawn or all rows have stopped."""
    return _decode(unstack_layers(params, config), state, scalars, until, config, spec)


def _prefill(
    params: Params, prompts: Prompts, scalars: SamplerScalars, config: ModelConfig, spec: SamplerSpec
) -> DecodeState:
    P, L = prompts.tokens.shape
    G, N = spec.samples_per_prompt, spec.max_new_tokens
    B = P * G
    segment_ids = prompts.mask.astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
    # The last drawn token is never fed back, so N - 1 slots hold the completion.
    cache = init_cache(config, P, L + N - 1)
    hidden, cache = forward_cached(params, config, prompts.tokens, positions, segment_ids, cache)
    logits = compute_logits(hidden[:, -1], unembedding(params, config), config)
    samples = jnp.tile(jnp.arange(G, dtype=jnp.int32), P)
    state = DecodeState(
        t=jnp.int32(0),
        cache=repeat_rows(cache, G),
        last=jnp.zeros((B,), jnp.int32),
        positions=jnp.repeat(positions[:, -1], G),
        done=jnp.zeros((B,), bool),
        keys=row_keys(scalars.seed, scalars.step, jnp.repeat(prompts.prompt_ids, G), samples),
        tokens=jnp.full((B, N), spec.pad_id, jnp.int32),
        sampler_logps=jnp.zeros((B, N), jnp.float32),
        policy_logps=jnp.zeros((B, N), jnp.float32),
        lengths=jnp.zeros((B,), jnp.int32),
    )
    return _emit(state, jnp.repeat(logits, G, axis=0), scalars, spec)


def _emit(state: DecodeState, logits: Array, scalars: SamplerScalars, spec: SamplerSpec) -> DecodeState:
    """Draws a token a row from `[B, V]` logits and records it."""
    logps = sampling_logps(logits, spec.method, scalars.temperature, scalars.top_p)
    if spec.method.greedy:
        token = jnp.argmax(logps, axis=-1).astype(jnp.int32)
    else:
        token = draw(jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, state.t), logps)
    pick = lambda table: jnp.take_along_axis(table, token[:, None], axis=1)[:, 0]  # noqa: E731
    plain = pick(logits) - jax.nn.logsumexp(logits, axis=-1)
    live = ~state.done

    def put(buffer: Array, value: Array, fill: int | float) -> Array:
        value = jnp.where(live, value, jnp.asarray(fill, value.dtype))
        return jax.lax.dynamic_update_slice(buffer, value[:, None], (0, state.t))

    stops = jnp.asarray(spec.stop_tokens, jnp.int32)
    return state.replace(
        t=state.t + 1,
        last=token,
        positions=state.positions + 1,
        done=state.done | jnp.any(token[:, None] == stops[None, :], axis=1),
        tokens=put(state.tokens, token, spec.pad_id),
        sampler_logps=put(state.sampler_logps, pick(logps), 0.0),
        policy_logps=put(state.policy_logps, plain, 0.0),
        lengths=state.lengths + live,
    )


def _decode(
    params: Params,
    state: DecodeState,
    scalars: SamplerScalars,
    until: Int[Array, ""],
    config: ModelConfig,
    spec: SamplerSpec,
) -> DecodeState:
    unembed_DV = unembedding(params, config)
    real = jnp.ones((state.last.shape[0], 1), jnp.int32)

    def body(state: DecodeState) -> DecodeState:
        hidden, cache = forward_cached(
            params, config, state.last[:, None], state.positions[:, None], real, state.cache
        )
        logits = compute_logits(hidden[:, 0], unembed_DV, config)
        return _emit(state.replace(cache=cache), logits, scalars, spec)

    return jax.lax.while_loop(lambda s: (s.t < until) & ~s.done.all(), body, state)


def _completions(state: DecodeState) -> Completions:
    mask = jnp.arange(state.tokens.shape[1])[None, :] < state.lengths[:, None]
    return Completions(
        tokens=state.tokens,
        mask=mask,
        sampler_logps=state.sampler_logps,
        policy_logps=state.policy_logps,
        stop_reason=jnp.where(state.done, STOPPED, TRUNCATED).astype(jnp.int32),
        lengths=state.lengths,
    )
