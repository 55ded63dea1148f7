"""The engine's compiled programs: laying out parameters, filling slots, decoding, and the host's say on rows.

Shapes: B slots, R rows taken in together, L prompt slots, M tokens given at a time.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from models.cache import KVCache, init_cache, insert_rows, resize, take_rows, with_prefix
from models.config import ModelConfig
from models.transformer import Params
from research.sampling.decode import COMPILER_OPTIONS, Slots, decode, prefill
from research.sampling.methods import row_keys
from research.sampling.types import SamplerScalars, SamplerSpec
from research.sampling.weights import Weights, sampling_params

UNCHANGED = -1
"""As a number of given tokens: those that a row still has stay."""


class Entries(NamedTuple):
    """R rows to take in; a slot of B or more takes nothing in."""

    slots: Int[Any, " R"]
    sources: Int[Any, " R"]
    last: Int[Any, " R"]
    positions: Int[Any, " R"]
    limits: Int[Any, " R"]
    prompt_ids: Int[Any, " R"]
    sample_ids: Int[Any, " R"]
    seen: Bool[Any, "R V"] | None


@partial(jax.jit, static_argnames=("config", "weights"))
def layout_program(params: Params, *, config: ModelConfig, weights: Weights) -> Params:
    """`weights.sampling_params`, once per update of the policy."""
    return sampling_params(params, config, weights)


@partial(jax.jit, static_argnames="config", compiler_options=COMPILER_OPTIONS)
def prefill_program(
    params: Params,
    tokens: Int[Array, "R L"],
    mask: Bool[Array, "R L"],
    prefix: KVCache | None,
    *,
    config: ModelConfig,
) -> KVCache:
    """`decode.prefill` of R prompts."""
    return prefill(params, tokens, mask, config, prefix)


@partial(jax.jit, static_argnames=("batch", "length", "give", "config", "spec"))
def empty_slots(
    prefix: KVCache | None, *, batch: int, length: int, give: int, config: ModelConfig, spec: SamplerSpec
) -> Slots:
    """Free slots only, behind a prefix, written up to `length`."""
    cache = init_cache(config, batch, length, int8=spec.int8_cache).replace(length=jnp.int32(length))
    zeros = jnp.zeros((batch,), jnp.int32)
    return Slots(
        cache=with_prefix(cache, prefix),
        last=zeros,
        positions=zeros,
        drawn=zeros,
        limits=zeros,
        live=zeros > 0,
        keys=row_keys(jnp.int32(0), jnp.int32(0), zeros, zeros),
        given=jnp.zeros((batch, give), jnp.int32),
        given_left=zeros,
        seen=jnp.zeros((batch, config.vocab_size), bool) if spec.controls.repetition_penalty else None,
    )


@partial(jax.jit, donate_argnames="slots")
def place_program(slots: Slots, filled: KVCache, entries: Entries, scalars: SamplerScalars) -> Slots:
    """Rows of prefilled prompts into their slots."""
    put = lambda x, new: x.at[entries.slots].set(new, mode="drop")  # noqa: E731
    return slots.replace(
        cache=insert_rows(slots.cache, filled, entries.slots, entries.sources),
        last=put(slots.last, entries.last),
        positions=put(slots.positions, entries.positions),
        drawn=put(slots.drawn, 0),
        limits=put(slots.limits, entries.limits),
        live=put(slots.live, True),
        keys=put(slots.keys, row_keys(scalars.seed, scalars.step, entries.prompt_ids, entries.sample_ids)),
        given_left=put(slots.given_left, 0),
        seen=None if entries.seen is None or slots.seen is None else put(slots.seen, entries.seen),
    )


@partial(jax.jit, static_argnames="slots")
def resize_program(state: Slots, drop: Int[Array, ""], *, slots: int) -> Slots:
    """`models.cache.resize` of the slots' cache."""
    return state.replace(cache=resize(state.cache, slots, drop=drop))


@jax.jit
def shrink_program(slots: Slots, rows: Int[Array, " R"]) -> Slots:
    """Only these slots, once nobody waits for the others."""
    rest = slots.replace(cache=slots.cache.segment_ids)
    kept = jax.tree.map(lambda x: x[rows], rest)
    return kept.replace(cache=take_rows(slots.cache, rows))


@partial(jax.jit, donate_argnames="slots")
def act_program(
    slots: Slots, live: Bool[Array, " B"], given: Int[Array, "B M"], left: Int[Array, " B"]
) -> Slots:
    """What the host says of each row: whether it goes on, and tokens to feed first."""
    changed = left != UNCHANGED
    return slots.replace(
        live=live,
        given=jnp.where(changed[:, None], given, slots.given),
        given_left=jnp.where(changed, left, slots.given_left),
    )


decode_program = jax.jit(
    decode,
    static_argnames=("steps", "config", "spec"),
    donate_argnames="slots",
    compiler_options=COMPILER_OPTIONS,
)
"""`decode.decode`, the slots updated in place."""
