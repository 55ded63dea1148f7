"""The engine's compiled programs: laying out parameters, filling slots, decoding, and applying a callback's actions.

Shapes: B slots, R requests admitted together, M forced tokens.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from models.config import ModelConfig
from models.decode.cache import KVCache, init_cache
from models.decode.rows import insert_rows, resize, take_rows, with_prefix
from research.sampling.decode import COMPILER_OPTIONS, Slots, decode, prefill
from research.sampling.methods import row_keys
from research.sampling.types import SamplerScalars, SamplerSpec
from research.sampling.weights import sampling_params

UNCHANGED = -1
"""As a number of forced tokens: those that a row still has stay."""

layout_program = jax.jit(sampling_params, static_argnames=("config", "weights"))
"""`weights.sampling_params`, once per update of the policy."""

prefill_program = jax.jit(prefill, static_argnames="config", compiler_options=COMPILER_OPTIONS)
"""`decode.prefill` of R prompts."""

decode_program = jax.jit(
    decode, static_argnames=("steps", "config", "spec"), donate_argnames="slots", compiler_options=COMPILER_OPTIONS
)
"""`decode.decode`, the slots updated in place."""


class Admissions(NamedTuple):
    """R requests to admit; a slot of B or more admits nothing."""

    slots: Int[Any, " R"]
    sources: Int[Any, " R"]
    last: Int[Any, " R"]
    positions: Int[Any, " R"]
    limits: Int[Any, " R"]
    prompt_ids: Int[Any, " R"]
    sample_ids: Int[Any, " R"]
    seen: Bool[Any, "R V"] | None


@partial(jax.jit, static_argnames=("batch", "length", "max_forced", "config", "spec"))
def empty_slots(
    prefix: KVCache | None, *, batch: int, length: int, max_forced: int, config: ModelConfig, spec: SamplerSpec
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
        forced=jnp.zeros((batch, max_forced), jnp.int32),
        forced_left=zeros,
        seen=jnp.zeros((batch, config.vocab_size), bool) if spec.controls.repetition_penalty else None,
    )


@partial(jax.jit, donate_argnames="slots")
def admit_program(slots: Slots, filled: KVCache, new: Admissions, scalars: SamplerScalars) -> Slots:
    """Rows of prefilled prompts into their slots."""
    put = lambda x, values: x.at[new.slots].set(values, mode="drop")  # noqa: E731
    return slots.replace(
        cache=insert_rows(slots.cache, filled, new.slots, new.sources),
        last=put(slots.last, new.last),
        positions=put(slots.positions, new.positions),
        drawn=put(slots.drawn, 0),
        limits=put(slots.limits, new.limits),
        live=put(slots.live, True),
        keys=put(slots.keys, row_keys(scalars.seed, scalars.step, new.prompt_ids, new.sample_ids)),
        forced_left=put(slots.forced_left, 0),
        seen=None if new.seen is None or slots.seen is None else put(slots.seen, new.seen),
    )


@partial(jax.jit, static_argnames="slots")
def resize_program(state: Slots, drop: Int[Array, ""], *, slots: int) -> Slots:
    """`models.decode.rows.resize` of the slots' cache."""
    return state.replace(cache=resize(state.cache, slots, drop=drop))


@jax.jit
def shrink_program(slots: Slots, rows: Int[Array, " R"]) -> Slots:
    """These slots only."""
    rest = slots.replace(cache=slots.cache.segment_ids)
    kept = jax.tree.map(lambda x: x[rows], rest)
    return kept.replace(cache=take_rows(slots.cache, rows))


@partial(jax.jit, donate_argnames="slots")
def act_program(slots: Slots, live: Bool[Array, " B"], forced: Int[Array, "B M"], left: Int[Array, " B"]) -> Slots:
    """A callback's actions: whether each row goes on, and tokens to feed first."""
    changed = left != UNCHANGED
    return slots.replace(
        live=live,
        forced=jnp.where(changed[:, None], forced, slots.forced),
        forced_left=jnp.where(changed, left, slots.forced_left),
    )
