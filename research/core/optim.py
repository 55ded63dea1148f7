"""AdamW with warm-up, cosine decay and global-norm clipping; every number is traced."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


class OptimizerScalars(NamedTuple):
    """Traced hyperparameters, float32 scalars: changing one never recompiles.

    Attributes:
      learning_rate: peak learning rate.
      warmup_steps: length of the linear warm-up, optimizer steps.
      decay_steps: all optimizer steps, warm-up included; the cosine decay ends after the last of them.
      end_fraction: share of the peak that the decay ends at; 1 keeps the rate constant.
      b1, b2: Adam's decay rates.
      eps: added to the root of the second moment, outside the root (Kingma and Ba 2015, algorithm 1).
      weight_decay: decoupled (Loshchilov and Hutter 2019), on matrices only: norms' scales are not decayed.
      clip_norm: largest global gradient norm.
    """

    learning_rate: Float[Any, ""]
    warmup_steps: Float[Any, ""]
    decay_steps: Float[Any, ""]
    end_fraction: Float[Any, ""]
    b1: Float[Any, ""]
    b2: Float[Any, ""]
    eps: Float[Any, ""]
    weight_decay: Float[Any, ""]
    clip_norm: Float[Any, ""]


def learning_rate_at(step: Int[Array, ""], s: OptimizerScalars) -> Float[Array, ""]:
    """Learning rate of optimizer step `step`, counted from 0; positive at every step before `decay_steps`.

    `lr * min((step + 1) / warmup, 1) * (end + (1 - end) * (1 + cos(pi * done)) / 2)` with
    `done = (step - warmup) / (decay - warmup)` within [0, 1].

    The first update is at `lr / warmup`, the last one of the warm-up and the first one after it are at the peak, and
    `end_fraction` is reached right after the last update, at step `decay_steps`.
    """
    step = step.astype(jnp.float32)
    warm = jnp.minimum((step + 1.0) / jnp.maximum(s.warmup_steps, 1.0), 1.0)
    span = jnp.maximum(s.decay_steps - s.warmup_steps, 1.0)
    done = jnp.clip((step - s.warmup_steps) / span, 0.0, 1.0)
    cosine = s.end_fraction + (1.0 - s.end_fraction) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
    return s.learning_rate * warm * cosine


def make_optimizer(s: OptimizerScalars, step: Int[Array, ""]) -> optax.GradientTransformation:
    """The update rule at one step; built inside jit from traced numbers, its state's shape never changes."""
    return optax.chain(
        optax.clip_by_global_norm(s.clip_norm),
        optax.scale_by_adam(b1=s.b1, b2=s.b2, eps=s.eps),
        optax.add_decayed_weights(s.weight_decay, mask=_is_matrix),
        optax.scale(-learning_rate_at(step, s)),
    )


def init_optimizer(params: Any) -> optax.OptState:
    """The optimizer state of `params`, float32 whatever their dtype; keeps the logical axes of boxed ones."""
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    zero = jnp.float32(0.0)
    return make_optimizer(OptimizerScalars(*[zero] * len(OptimizerScalars._fields)), jnp.int32(0)).init(
        params
    )


def _is_matrix(params: Any) -> Any:
    """True on every parameter but the norms' scales (which layer stacking turns into matrices too)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "key", "") != "scale", params)
