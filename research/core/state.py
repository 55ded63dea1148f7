"""What training changes: parameters, optimizer state, step; and how parameters are laid out."""

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from models.axes import check_divisible, param_shardings
from models.config import ModelConfig
from models.heads import STEP_HEAD_STD, VALUE_HEAD_STD, init_head, init_scorer, reward_head_std
from models.transformer import Params, init_params
from research.core.errors import ConfigError
from research.core.optim import Rule, init_optimizer

Layout = Literal["policy", "scorer", "step_scorer", "actor_critic"]
"""What the parameters are.

policy: a transformer. scorer: {trunk, head} with one output a token (rewards, values). step_scorer: the same
with two (wrong, right). actor_critic: {policy, value}, the value model being a scorer.
"""


class TrainState(flax.struct.PyTreeNode):
    """A pytree that a checkpoint holds whole.

    Attributes:
      step: int32 scalar, batches that this stage has seen; one whose update was skipped counts too.
      params: what is trained, in the algorithm's layout.
      opt_state: optax state.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any


def init_state(config: ModelConfig, mesh: Mesh, seed: int, rule: Rule, layout: Layout = "policy") -> TrainState:
    """A fresh state, created already split over the mesh."""
    init = jax.jit(
        _unboxed_init,
        static_argnames=("config", "rule", "layout"),
        out_shardings=state_shardings(config, mesh, rule, layout),
    )
    return init(jax.random.key(seed), config=config, rule=rule, layout=layout)


def state_from_params(
    params: Params, config: ModelConfig, mesh: Mesh, rule: Rule, layout: Layout = "policy"
) -> TrainState:
    """A state that starts from given parameters with a fresh optimizer and step 0."""

    def start(params: Params) -> TrainState:
        return TrainState(jnp.int32(0), params, init_optimizer(params, rule))

    return jax.jit(start, out_shardings=state_shardings(config, mesh, rule, layout))(params)


def grow(
    policy: Params, config: ModelConfig, mesh: Mesh, layout: Layout, seed: int, value: Params | None = None
) -> Params:
    """A policy's parameters as the trunk of what an algorithm trains, with fresh heads.

    Args:
      policy: a transformer's parameters.
      config: static model description.
      mesh: the devices.
      layout: what is trained.
      seed: of the heads.
      value: a scorer to start the value model from; None starts it from the policy with a head of zeros.
    """
    if layout == "policy":
        return policy
    outputs = 2 if layout == "step_scorer" else 1
    boxed = partial(init_head, config, outputs=outputs, head_std=_head_std(config, layout))
    shardings = param_shardings(jax.eval_shape(boxed, jax.random.key(0)), mesh)
    head = jax.jit(lambda key: nn.meta.unbox(boxed(key)), out_shardings=shardings)(jax.random.key(seed))
    if layout != "actor_critic":
        return {"trunk": policy, "head": head}
    if value is None:  # a copy: both are donated to the first update
        value = {"trunk": jax.tree.map(jnp.copy, policy), "head": head}
    return {"policy": policy, "value": value}


def policy_of(params: Params, layout: Layout) -> Params:
    """The policy among what an algorithm trains.

    Raises:
      ValueError: a scorer is no policy.
    """
    if layout == "actor_critic":
        return params["policy"]
    if layout != "policy":
        raise ValueError(f"layout: got {layout!r}, expected one with a policy")
    return params


def state_shardings(config: ModelConfig, mesh: Mesh, rule: Rule, layout: Layout = "policy") -> TrainState:
    """NamedShardings of every leaf of a TrainState.

    Raises:
      ConfigError: a sharded axis of the model does not divide over the mesh.
    """
    try:
        check_divisible(config, mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    boxed = jax.eval_shape(lambda key: _boxed_init(key, config, rule, layout), jax.random.key(0))
    return param_shardings(boxed, mesh)  # type: ignore[return-value]


def abstract_state(config: ModelConfig, mesh: Mesh, rule: Rule, layout: Layout = "policy") -> TrainState:
    """Shapes, dtypes and shardings of a TrainState: what a checkpoint is restored into."""
    shapes = jax.eval_shape(lambda key: _unboxed_init(key, config, rule, layout), jax.random.key(0))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        state_shardings(config, mesh, rule, layout),
    )


def abstract_params(config: ModelConfig, mesh: Mesh, layout: Layout = "policy") -> Params:
    """Shapes, dtypes and shardings of the parameters alone."""
    return abstract_state(config, mesh, _NO_RULE, layout).params


_NO_RULE = Rule({}, lambda _options: optax.identity())


def _head_std(config: ModelConfig, layout: Layout) -> float:
    if layout == "scorer":
        return reward_head_std(config)
    return STEP_HEAD_STD if layout == "step_scorer" else VALUE_HEAD_STD


def _boxed_init(key: Array, config: ModelConfig, rule: Rule, layout: Layout) -> TrainState:
    std = _head_std(config, layout)
    params: Params
    if layout == "policy":
        params = init_params(config, key)
    elif layout == "actor_critic":
        value = init_scorer(config, key, outputs=1, head_std=std)
        params = {"policy": init_params(config, key), "value": value}
    else:
        outputs = 2 if layout == "step_scorer" else 1
        params = init_scorer(config, key, outputs=outputs, head_std=std)
    return TrainState(jnp.int32(0), params, init_optimizer(params, rule))


def _unboxed_init(key: Array, config: ModelConfig, rule: Rule, layout: Layout) -> TrainState:
    return nn.meta.unbox(_boxed_init(key, config, rule, layout))
