"""Speculative decoding: cheap proposals, scored by the model many at a time; the distribution stays the model's.

A round proposes k tokens x_1..x_k from q and scores them in one forward pass of k + 1 tokens, which gives p_1..p_(k+1).
x_i is accepted with probability min(1, p_i(x_i) / q_i(x_i)); the first that is not is drawn anew from
norm(max(p_i - q_i, 0)), and if all are, one more token is drawn from p_(k+1) (Leviathan et al. 2023, algorithm 1; Chen
et al. 2023, algorithm 2). p and q are what is left after temperature, top-k and top-p.

Shapes: P prompts, G samples a prompt, B = P * G rows, L prompt slots, N completion slots, k proposals, T = k + 1,
S slots of the cache, V vocabulary.
"""

import dataclasses
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.config import ModelConfig
from models.decode.cache import KVCache, LayerCache
from models.decode.rows import resize
from models.softmax import compute_logits
from models.transformer import Params, forward_cached, unembedding
from research.core.errors import ConfigError
from research.sampling.drafts import Categorical, Draft, Noise, propose_by_model, propose_by_ngram, verify
from research.sampling.methods import scaled_logits
from research.sampling.sampler import COMPILER_OPTIONS, Slots, completions, start
from research.sampling.types import Completions, Prompts, SamplerScalars, SamplerSpec
from research.sampling.weights import sampling_params


class SpeculativeStats(flax.struct.PyTreeNode):
    """Counts of what became of the proposals."""

    forwards: Int[Any, ""] = np.int32(0)  # of the target after the prefill; each serves all unfinished rows
    row_rounds: Int[Any, ""] = np.int32(0)  # rounds, summed over the rows that were unfinished
    proposed: Int[Any, ""] = np.int32(0)  # proposals that fitted into `max_new_tokens`
    accepted: Int[Any, ""] = np.int32(0)  # those of them that became part of a completion
    tokens: Int[Any, ""] = np.int32(0)  # completion tokens

    def metrics(self) -> dict[str, float]:
        """Metrics, on the host: target forwards, share of proposals accepted, tokens of a row from one forward."""
        return {
            "sampler/target_forwards": float(self.forwards),
            "sampler/acceptance_rate": float(self.accepted) / max(float(self.proposed), 1.0),
            "sampler/tokens_per_forward": float(self.tokens) / max(float(self.row_rounds), 1.0),
        }


class _State(flax.struct.PyTreeNode):
    """Everything between two rounds."""

    slots: Slots  # as plain decoding has them
    draft_layers: tuple[LayerCache, ...]  # in the same slots as the target's; () without a draft model
    text: Int[Array, "B W"]  # prompts and completions, W = L + N
    sampler_logps: Float[Array, "B N"]
    policy_logps: Float[Array, "B N"]
    stats: SpeculativeStats


@partial(jax.jit, static_argnames=("config", "spec"), compiler_options=COMPILER_OPTIONS)
def sample_speculative(
    params: Params, draft: Draft, prompts: Prompts, scalars: SamplerScalars, *, config: ModelConfig, spec: SamplerSpec
) -> tuple[Completions, SpeculativeStats]:
    """Draws what `sampler.sample` draws in distribution, in fewer forward passes of the model.

    Randomness is keyed by the row's key and its number of tokens at the round's beginning, so that a completion does
    not depend on its neighbours. Greedy completions are those of `sampler.sample`.

    Rows share the slot at which the cache is written. It advances by the most tokens that any row accepted, which
    leaves gaps in the others; a cache without room for the next k + 1 tokens is packed. It has L - 1 + N + k slots, and
    `spec.cache_bucket` more for the gaps where B > 1.

    The draft draws with the same `scalars`, and its weights too are kept as `spec.weights` says; `spec.engine` is not
    used. Returns completions as `sampler.sample` lays them out, and counts of the proposals.

    Raises:
      ConfigError: the draft's vocabulary is not the model's.
    """
    if draft.config is not None and draft.config.vocab_size != config.vocab_size:
        raise ConfigError(
            f"draft: got a vocabulary of {draft.config.vocab_size} tokens, expected the target's {config.vocab_size} "
            "because their distributions are compared token by token"
        )
    if prompts.tokens.shape[1] == 1:  # the draft re-reads the slot before the last token
        prompts = prompts.replace(
            tokens=jnp.pad(prompts.tokens, ((0, 0), (1, 0))), mask=jnp.pad(prompts.mask, ((0, 0), (1, 0)))
        )
    params = sampling_params(params, config, spec.weights)
    slots = start(params, prompts, scalars, config=config, spec=spec)
    draft_layers: tuple[LayerCache, ...] = ()
    if (small := draft.config) is not None:
        draft = draft.replace(params=sampling_params(draft.params, small, spec.weights))
        plain = dataclasses.replace(spec, int8_cache=False)
        draft_layers = start(draft.params, prompts, scalars, config=small, spec=plain).cache.layers
    (B,), L, N, k = slots.last.shape, prompts.tokens.shape[1], spec.max_new_tokens, draft.tokens
    empty = jnp.full((B, N), spec.pad_id, jnp.int32)
    zeros = jnp.zeros((B, N), jnp.float32)
    text = jnp.concatenate([jnp.repeat(prompts.tokens, spec.samples_per_prompt, axis=0), empty], axis=1)
    state = _State(slots, draft_layers, text, zeros, zeros, SpeculativeStats())
    first = L - 1 - slots.positions  # the slot of each row's first token in its text
    step = partial(_round, params, draft, scalars, first, config=config, spec=spec)
    bucket = spec.cache_bucket
    for done in range(0, N, bucket):
        until = min(done + bucket, N)
        room = L - 1 + until + k + (bucket if B > 1 else 0)
        state = _caches(state, lambda cache, room=room: resize(cache, room))
        state = _rounds(state, step, jnp.int32(until), k)
    mask = jnp.arange(N)[None, :] < state.slots.drawn[:, None]
    out = completions(state.text[:, -N:], mask, state.sampler_logps, state.policy_logps, spec)
    return out, state.stats


def _rounds(state: _State, step: Any, until: Int[Array, ""], k: int) -> _State:
    """Rounds until a row has `until` tokens or none is unfinished."""

    def unfinished(state: _State) -> Array:
        slots = state.slots
        return jnp.any(slots.live) & (jnp.max(jnp.where(slots.live, slots.drawn, 0)) < until)

    if state.slots.live.shape[0] == 1:  # one row leaves no gaps
        state = _caches(state, KVCache.squeezed)
        return _caches(jax.lax.while_loop(unfinished, step, state), KVCache.unsqueezed)

    def has_room(state: _State) -> Array:
        cache = state.slots.cache
        return unfinished(state) & (cache.length + k + 1 <= cache.slots)

    return jax.lax.while_loop(unfinished, lambda state: _packed(jax.lax.while_loop(has_room, step, state)), state)


def _round(
    params: Params,
    draft: Draft,
    scalars: SamplerScalars,
    first_B: Int[Array, " B"],
    state: _State,
    *,
    config: ModelConfig,
    spec: SamplerSpec,
) -> _State:
    """Up to k + 1 tokens more a row."""
    slots, cache, k, V = state.slots, state.slots.cache, draft.tokens, config.vocab_size
    last_B = state.text.shape[1] - spec.max_new_tokens - 1 + slots.drawn  # the slot of the last token in the text
    noise = Noise.of(jax.vmap(jax.random.fold_in)(slots.keys, slots.drawn), k, V)
    draft_layers = state.draft_layers
    if draft.config is None:
        proposals = propose_by_ngram(state.text, first_B, last_B, k)
    else:
        newest_B2 = jnp.take_along_axis(state.text, last_B[:, None] + jnp.array([[-1, 0]]), axis=1)
        known = slots.replace(cache=cache.replace(layers=draft_layers))
        proposals, read = propose_by_model(draft, known, newest_B2, noise, scalars, spec.method)
        draft_layers = read.layers

    step_T = jnp.arange(k + 1, dtype=jnp.int32)[None, :]
    live_BT = jnp.broadcast_to(slots.live[:, None], (slots.live.shape[0], k + 1))
    hidden, written = forward_cached(
        params,
        config,
        jnp.concatenate([slots.last[:, None], proposals.tokens], axis=1),
        slots.positions[:, None] + step_T,
        live_BT.astype(jnp.int32),
        cache,
    )
    logits_BTV = compute_logits(hidden, unembedding(params), config)
    policy = Categorical(logits_BTV, jax.nn.logsumexp(logits_BTV, axis=-1))
    drawn_from = policy
    if not spec.method.greedy:
        scaled_RV = scaled_logits(logits_BTV.reshape(-1, V), spec.method, scalars.temperature, scalars.top_p)
        scaled_BTV = scaled_RV.reshape(logits_BTV.shape)
        drawn_from = Categorical(scaled_BTV, jax.nn.logsumexp(scaled_BTV, axis=-1))
    accepted_B, tokens_BT = verify(proposals, drawn_from, noise, greedy=spec.method.greedy)

    stops = jnp.asarray(spec.stop_tokens, jnp.int32)
    stop_BT = jnp.any(tokens_BT[:, :, None] == stops[None, None, :], axis=2)
    room_B = slots.limits - slots.drawn
    new_BT = live_BT & (step_T <= accepted_B[:, None]) & (step_T < room_B[:, None])
    new_BT = new_BT & (jnp.cumsum(stop_BT, axis=1) - stop_BT == 0)
    count_B = jnp.sum(new_BT, axis=1, dtype=jnp.int32)
    live_B = slots.live & ~jnp.any(new_BT & stop_BT, axis=1) & (count_B < room_B)
    # Rejected tokens, and all of a finished row, are in slots that attention masks out.
    kept_BT = (live_B[:, None] & (step_T <= accepted_B[:, None])).astype(jnp.int32)
    cache = written.replace(
        segment_ids=jax.lax.dynamic_update_slice(written.segment_ids, kept_BT, (0, cache.length)),
        length=cache.length + jnp.max(jnp.where(live_B, accepted_B, 0)) + 1,
    )
    sampler_BT = jnp.zeros_like(policy.log_normalizer) if spec.method.greedy else drawn_from.logps_of(tokens_BT)
    stats = state.stats
    return _State(
        slots=slots.replace(
            cache=cache,
            last=jnp.take_along_axis(tokens_BT, accepted_B[:, None], axis=1)[:, 0],
            positions=slots.positions + accepted_B + 1,
            drawn=slots.drawn + count_B,
            live=live_B,
        ),
        draft_layers=draft_layers,
        text=_written(state.text, last_B + 1, tokens_BT, count_B),
        sampler_logps=_written(state.sampler_logps, slots.drawn, sampler_BT, count_B),
        policy_logps=_written(state.policy_logps, slots.drawn, policy.logps_of(tokens_BT), count_B),
        stats=SpeculativeStats(
            forwards=stats.forwards + 1,
            row_rounds=stats.row_rounds + jnp.sum(slots.live),
            proposed=stats.proposed + jnp.sum(jnp.where(slots.live, jnp.minimum(k, room_B), 0)),
            accepted=stats.accepted + jnp.sum(jnp.minimum(accepted_B, count_B)),
            tokens=stats.tokens + jnp.sum(count_B),
        ),
    )


def _written(buffer_BW: Array, start_B: Array, values_BT: Array, count_B: Array) -> Array:
    """The first `count` values of each row from slot `start` on; no scatter, which a CPU does one by one."""
    T = values_BT.shape[1]
    place = jnp.arange(buffer_BW.shape[1])[None, :] - start_B[:, None]
    inside = (place >= 0) & (place < count_B[:, None])
    return jnp.where(inside, jnp.take_along_axis(values_BT, jnp.clip(place, 0, T - 1), axis=1), buffer_BW)


def _caches(state: _State, fn: Any) -> _State:
    """`fn` on the target's cache and on the draft's."""
    cache = fn(state.slots.cache)
    draft = fn(state.slots.cache.replace(layers=state.draft_layers))
    return state.replace(slots=state.slots.replace(cache=cache), draft_layers=draft.layers)


def _packed(state: _State) -> _State:
    """Each row's tokens moved together, their last in the slot before the next; finished rows are dropped."""
    cache, live = state.slots.cache, state.slots.live
    held = (cache.segment_ids > 0) & live[:, None]
    length = jnp.max(jnp.sum(held, axis=1, dtype=jnp.int32))
    # Empty slots first, then the tokens in their order; turned so that these end at `length`.
    order_BS = jnp.roll(jnp.argsort(held, axis=1, stable=True), length - cache.slots, axis=1)

    def gather(x: Array) -> Array:
        index = order_BS[:, None] if x.ndim == 3 else order_BS[:, None, :, None]
        return jnp.take_along_axis(x, index, axis=2)

    segment_ids = jnp.take_along_axis(held.astype(jnp.int32), order_BS, axis=1)
    return _caches(state, lambda cache: cache.map_slots(gather, segment_ids=segment_ids, length=length))
