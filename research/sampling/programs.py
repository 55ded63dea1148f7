"""The engine's compiled programs: laying out parameters, filling slots, decoding, and applying a callback's actions.

Shapes: B slots, R requests admitted together, M forced tokens.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from models.config import ModelConfig
from models.decode.cache import KVCache, init_cache
from models.decode.rows import insert_rows, resize, take_rows, with_prefix
from research.sampling.methods import row_keys
from research.sampling.sampler import COMPILER_OPTIONS, Slots, decode, prefill
from research.sampling.types import EngineSpec, SamplerScalars
from research.sampling.weights import sampling_params

UNCHANGED = -1
"""As a number of forced tokens: those that a row still has stay."""

# Once per update of the policy.
layout_program = jax.jit(sampling_params, static_argnames=("config", "weights"))
prefill_program = jax.jit(prefill, static_argnames="config", compiler_options=COMPILER_OPTIONS)
decode_program = jax.jit(
    decode, static_argnames=("steps", "config", "spec"), donate_argnames="slots", compiler_options=COMPILER_OPTIONS
)


@partial(jax.jit, static_argnames=("length", "config", "sizes", "int8", "penalised"))
def empty_slots(
    prefix: KVCache | None, *, length: int, config: ModelConfig, sizes: EngineSpec, int8: bool, penalised: bool
) -> Slots:
    """Free slots only, behind a prefix, written up to `length`."""
    B = sizes.slots
    cache = init_cache(config, B, length, int8=int8).replace(length=jnp.int32(length))
    zeros = jnp.zeros((B,), jnp.int32)
    return Slots(
        cache=with_prefix(cache, prefix),
        last=zeros,
        positions=zeros,
        drawn=zeros,
        limits=zeros,
        live=zeros > 0,
        keys=row_keys(jnp.int32(0), jnp.int32(0), zeros, zeros),
        forced=jnp.zeros((B, sizes.max_forced), jnp.int32),
        forced_left=zeros,
        seen=jnp.zeros((B, config.vocab_size), bool) if penalised else None,
    )


@partial(jax.jit, donate_argnames="slots")
def admit_program(
    slots: Slots, filled: KVCache, new: Int[Array, "7 R"], seen: Bool[Array, "R V"] | None, scalars: SamplerScalars
) -> Slots:
    """Rows of prefilled prompts into their slots.

    `new` has for each request its slot (B or more admits nothing), row of `filled`, last token, that one's position,
    limit of tokens, prompt id and sample id; `seen` the tokens of its prompt, for the repetition penalty.
    """
    rows, sources, last, positions, limits, prompt_ids, sample_ids = new
    put = lambda x, values: x.at[rows].set(values, mode="drop")  # noqa: E731
    return slots.replace(
        cache=insert_rows(slots.cache, filled, rows, sources),
        last=put(slots.last, last),
        positions=put(slots.positions, positions),
        drawn=put(slots.drawn, 0),
        limits=put(slots.limits, limits),
        live=put(slots.live, True),
        keys=put(slots.keys, row_keys(scalars.seed, scalars.step, prompt_ids, sample_ids)),
        forced_left=put(slots.forced_left, 0),
        seen=None if slots.seen is None else put(slots.seen, seen),
    )


@partial(jax.jit, static_argnames="slots")
def resize_program(state: Slots, drop: Int[Array, ""], *, slots: int) -> Slots:
    """`models.decode.rows.resize` of the slots' cache."""
    return state.replace(cache=resize(state.cache, slots, drop=drop))


@jax.jit
def shrink_program(slots: Slots, rows: Int[Array, " R"]) -> Slots:
    """These slots only."""
    kept = jax.tree.map(lambda x: x[rows], slots.replace(cache=None))
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
