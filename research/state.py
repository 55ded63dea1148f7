"""What training changes: parameters, optimizer state, step."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int

from models.axes import check_divisible, param_shardings
from models.config import ModelConfig
from models.transformer import Params, init_params
from research.errors import ConfigError
from research.optim import init_optimizer


class TrainState(flax.struct.PyTreeNode):
    """A pytree that a checkpoint holds whole.

    Attributes:
      step: int32 scalar, optimizer steps taken in this stage.
      params: the policy's parameters.
      opt_state: optax state.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any


def init_state(config: ModelConfig, mesh: Mesh, seed: int) -> TrainState:
    """A fresh state, created already split over the mesh."""
    return jax.jit(_unboxed_init, static_argnames="config", out_shardings=state_shardings(config, mesh))(
        jax.random.key(seed), config=config
    )


def state_from_params(params: Params, config: ModelConfig, mesh: Mesh) -> TrainState:
    """A state that starts from given parameters with a fresh optimizer and step 0."""
    shardings = state_shardings(config, mesh)

    def start(params: Params) -> TrainState:
        return TrainState(jnp.int32(0), params, init_optimizer(params))

    return jax.jit(start, out_shardings=shardings)(params)


def state_shardings(config: ModelConfig, mesh: Mesh) -> TrainState:
    """NamedShardings of every leaf of a TrainState.

    Raises:
      ConfigError: a sharded axis of the model does not divide over the mesh.
    """
    try:
        check_divisible(config, mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    boxed = jax.eval_shape(lambda key: _boxed_init(key, config), jax.random.key(0))
    return param_shardings(boxed, mesh)  # type: ignore[return-value]


def abstract_state(config: ModelConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a TrainState: what a checkpoint is restored into."""
    shapes = jax.eval_shape(lambda key: _unboxed_init(key, config), jax.random.key(0))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, state_shardings(config, mesh)
    )


def _boxed_init(key: Array, config: ModelConfig) -> TrainState:
    params = init_params(config, key)
    return TrainState(jnp.int32(0), params, init_optimizer(params))


def _unboxed_init(key: Array, config: ModelConfig) -> TrainState:
    return nn.meta.unbox(_boxed_init(key, config))
