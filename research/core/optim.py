"""Optimizers and schedules: rules that a config can name, warm-up, global-norm clipping; every number is traced."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Numbers = Mapping[str, Float[Any, ""]]
"""Traced options by name: a sweep over them compiles once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """An optimizer.

    `make` turns its options into the direction of an update, before the learning rate, weight decay included. The
    shape of its state must not depend on the numbers.
    """

    options: Mapping[str, Any]  # its keys, all traced numbers
    make: Callable[[Numbers], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A learning rate's course after the warm-up.

    `make` turns its options and the share of the decay that is done (0 at the first update after the warm-up, 1 after
    the last one of the stage) into the share of the peak rate.
    """

    options: Mapping[str, Any]  # its keys, all traced numbers
    make: Callable[[Numbers, Float[Array, ""]], Float[Array, ""]]


class OptimizerScalars(flax.struct.PyTreeNode):
    """What an update is computed by. Float32 scalars, traced: changing one never recompiles; the rules are static."""

    learning_rate: Float[Any, ""]  # at its peak
    warmup_steps: Float[Any, ""]  # length of the linear warm-up, optimizer steps
    decay_steps: Float[Any, ""]  # all optimizer steps, warm-up included; the schedule ends after the last of them
    clip_norm: Float[Any, ""]  # largest global gradient norm
    rule_options: Numbers
    schedule_options: Numbers
    rule: Rule = flax.struct.field(pytree_node=False)
    schedule: Schedule = flax.struct.field(pytree_node=False)


def learning_rate_at(step: Int[Array, ""], s: OptimizerScalars) -> Float[Array, ""]:
    """Learning rate of optimizer step `step`, counted from 0; positive at every step before `decay_steps`.

    `lr * min((step + 1) / warmup, 1) * schedule(done)` with `done = (step - warmup) / (decay - warmup)` within [0, 1]:
    the first update is at `lr / warmup`, the last one of the warm-up and the first one after it are at the peak, and
    the schedule's end is reached right after the last update, at step `decay_steps`.
    """
    step = step.astype(jnp.float32)
    warm = jnp.minimum((step + 1.0) / jnp.maximum(s.warmup_steps, 1.0), 1.0)
    span = jnp.maximum(s.decay_steps - s.warmup_steps, 1.0)
    done = jnp.clip((step - s.warmup_steps) / span, 0.0, 1.0)
    return s.learning_rate * warm * s.schedule.make(s.schedule_options, done)


def make_optimizer(s: OptimizerScalars, step: Int[Array, ""]) -> optax.GradientTransformation:
    """The update rule at one step; built inside jit from traced numbers, its state's shape never changes."""
    return optax.chain(
        optax.clip_by_global_norm(s.clip_norm), s.rule.make(s.rule_options), optax.scale(-learning_rate_at(step, s))
    )


def init_optimizer(params: Any, rule: Rule) -> optax.OptState:
    """The optimizer state of `params`, float32 whatever their dtype; keeps the logical axes of boxed ones."""
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    zero = jnp.float32(0.0)
    options = dict.fromkeys(rule.options, zero)
    still = Schedule({}, lambda _options, _done: zero)
    return make_optimizer(OptimizerScalars(zero, zero, zero, zero, options, {}, rule, still), jnp.int32(0)).init(params)


def decayed(coef: Float[Any, ""]) -> optax.GradientTransformation:
    """Decoupled weight decay (Loshchilov and Hutter 2019), on matrices only: norms' scales are not decayed."""

    def is_matrix(params: Any) -> Any:  # not by ndim: layer stacking turns scales into matrices too
        return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "key", "") != "scale", params)

    return optax.add_decayed_weights(coef, mask=is_matrix)


def adamw(o: Numbers) -> optax.GradientTransformation:
    """AdamW; epsilon is added to the root of the second moment, outside the root (Kingma and Ba 2015, algorithm 1)."""
    return optax.chain(optax.scale_by_adam(b1=o["b1"], b2=o["b2"], eps=o["eps"]), decayed(o["weight_decay"]))


def sgd(o: Numbers) -> optax.GradientTransformation:
    """Stochastic gradient descent with momentum."""
    return optax.chain(optax.trace(decay=o["momentum"]), decayed(o["weight_decay"]))


def cosine(o: Numbers, done: Float[Array, ""]) -> Float[Array, ""]:
    """`end + (1 - end) (1 + cos(pi done)) / 2` (Loshchilov and Hutter 2017)."""
    return o["end_fraction"] + (1.0 - o["end_fraction"]) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))


def linear(o: Numbers, done: Float[Array, ""]) -> Float[Array, ""]:
    """`1 - (1 - end) done`."""
    return 1.0 - (1.0 - o["end_fraction"]) * done
