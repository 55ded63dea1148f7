"""The pure steps of training: one preparation of a batch, one update on it, one evaluation of the loss.

All are jitted once at module level; what is static is hashable (algorithm, model, micro-batches), what is
a number is traced, so arms of an ablation that differ only in numbers share one compilation.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from models.config import ModelConfig
from models.transformer import Params
from objectives.types import WeightedSum
from research.algorithms.base import ALONE, Algorithm, Frozen, Scalars, Summed
from research.core.batch import Batch, split_batch
from research.core.cpu import training_options
from research.core.network import Network
from research.core.optim import OptimizerScalars, learning_rate_at, make_optimizer
from research.core.state import TrainState


class StepScalars(NamedTuple):
    """Every number of a step: the optimizer's, and the algorithm's own by name (beta, temperature ...)."""

    optimizer: OptimizerScalars
    objective: Scalars


_OPTIONS = training_options()
_jit = partial(jax.jit, static_argnames=("algorithm", "config"), compiler_options=_OPTIONS)


@partial(_jit, static_argnames=("algorithm", "config", "micro_batches"), donate_argnames="state")
def train_step(
    state: TrainState,
    batch: Batch,
    scalars: StepScalars,
    frozen: Frozen = ALONE,
    *,
    algorithm: Algorithm,
    config: ModelConfig,
    micro_batches: int = 1,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step on a batch.

    Totals, counts and gradients are summed over micro-batches and devices and divided once, so neither the number of
    micro-batches nor the mesh changes the loss. The update is skipped if the loss, the global norm of the gradient or
    that of the update is not finite: parameters and optimizer state (Adam's own count too) stay bit for bit as they
    were. `state.step` advances all the same: it counts batches, so the schedule stays in step with the loop.

    Returns the next state and scalar metrics: `loss`, `grad_norm` (before clipping), `learning_rate`, `skipped_updates`
    (1 or 0), and the algorithm's own, averaged with the same weights as the loss.
    """

    def objective(params: Params, part: Batch) -> tuple[Array, Summed]:
        loss, metrics = algorithm.loss(Network(params, config), part, scalars.objective, frozen)
        return loss.total, (loss, metrics)

    def gradient(params: Params, part: Batch) -> Any:
        """In float32 whatever the parameters' dtype, so that small parts add up."""
        grads, aux = jax.grad(objective, has_aux=True)(params, part)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), aux

    if micro_batches == 1:
        grads, (loss, sums) = gradient(state.params, batch)
    else:
        parts = split_batch(batch, micro_batches)
        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, state.params, first))

        def add(carry: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, gradient(state.params, part)), None

        (grads, (loss, sums)), _ = jax.lax.scan(add, zeros, parts)
    grads = jax.tree.map(lambda g: g / jnp.maximum(loss.count, 1e-8), grads)
    updates, opt_state = make_optimizer(scalars.optimizer, state.step).update(grads, state.opt_state, state.params)
    metrics = algorithm.summarize({name: value.mean() for name, value in sums.items()})
    metrics["loss"] = loss.mean()
    metrics["grad_norm"] = optax.tree.norm(grads)
    metrics["learning_rate"] = learning_rate_at(state.step, scalars.optimizer)
    sizes = jnp.stack([metrics["loss"], metrics["grad_norm"], optax.tree.norm(updates)])
    finite = jnp.isfinite(sizes).all()
    metrics["skipped_updates"] = 1.0 - finite.astype(jnp.float32)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (optax.apply_updates(state.params, updates), opt_state),
        (state.params, state.opt_state),
    )
    return TrainState(state.step + 1, params, opt_state), metrics


@_jit
def prepare_step(
    params: Params, batch: Batch, scalars: Scalars, frozen: Frozen = ALONE, *, algorithm: Algorithm, config: ModelConfig
) -> Batch:
    """The global batch with all that is computed once on it: reference log-probs, values, advantages."""
    prepared = algorithm.prepare(Network(params, config), batch, scalars, frozen)
    return jax.lax.stop_gradient(prepared)


@_jit
def eval_step(
    params: Params, batch: Batch, scalars: Scalars, frozen: Frozen = ALONE, *, algorithm: Algorithm, config: ModelConfig
) -> dict[str, WeightedSum]:
    """Loss and metrics of a batch as sums, to be added over batches and divided once."""
    loss, metrics = algorithm.loss(Network(params, config), batch, scalars, frozen)
    return {**metrics, "loss": loss}
