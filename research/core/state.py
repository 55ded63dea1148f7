"""What training changes: parameters, optimizer state, step; and how parameters are laid out."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
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
    """A pytree that a checkpoint holds whole."""

    step: Int[Array, ""]  # int32, batches that this stage has seen; one whose update was skipped counts too
    params: Params  # what is trained, in the algorithm's layout
    opt_state: Any  # of optax


def fresh_policy(config: ModelConfig, mesh: Mesh, seed: int) -> Params:
    """A policy's parameters before any training, created already split over the mesh."""
    shardings = _shardings(abstract_params(config, mesh))
    init = jax.jit(_init_policy, static_argnames="config", out_shardings=shardings)
    return init(jax.random.key(seed), config=config)


def state_from_params(
    params: Params, config: ModelConfig, mesh: Mesh, rule: Rule, layout: Layout = "policy"
) -> TrainState:
    """A state that starts from given parameters with a fresh optimizer and step 0."""
    shardings = _shardings(abstract_state(config, mesh, rule, layout))
    return jax.jit(lambda params: _start(params, rule), out_shardings=shardings)(params)


def grow(
    policy: Params, config: ModelConfig, mesh: Mesh, layout: Layout, seed: int, value: Params | None = None
) -> Params:
    """A policy's parameters as the trunk of what an algorithm trains, with fresh heads drawn from `seed`.

    `value` is a scorer to start the value model from; None starts it from the policy with a head of zeros.
    """
    if layout == "policy":
        return policy

    def boxed(key: Array) -> Params:
        return init_head(config, key, **_head(config, layout))

    shardings = _shardings(_abstract(boxed, config, mesh))
    head = jax.jit(lambda key: nn.meta.unbox(boxed(key)), out_shardings=shardings)(jax.random.key(seed))
    if layout != "actor_critic":
        return {"trunk": policy, "head": head}
    if value is None:  # a copy: both are donated to the first update
        value = {"trunk": jax.tree.map(jnp.copy, policy), "head": head}
    return {"policy": policy, "value": value}


def policy_of(params: Params, layout: Layout) -> Params:
    """The policy among what an algorithm trains; ValueError where that is a scorer."""
    if layout == "actor_critic":
        return params["policy"]
    if layout != "policy":
        raise ValueError(f"layout: got {layout!r}, expected one with a policy")
    return params


def abstract_state(config: ModelConfig, mesh: Mesh, rule: Rule, layout: Layout = "policy") -> TrainState:
    """Shapes, dtypes and shardings of a TrainState: what a checkpoint is restored into.

    ConfigError where a sharded axis of the model does not divide over the mesh.
    """
    return _abstract(lambda key: _start(_boxed_params(config, layout, key), rule), config, mesh)


def abstract_params(config: ModelConfig, mesh: Mesh, layout: Layout = "policy") -> Params:
    """Shapes, dtypes and shardings of the parameters alone; see `abstract_state`."""
    return _abstract(partial(_boxed_params, config, layout), config, mesh)


def _abstract(boxed: Callable[[Array], Any], config: ModelConfig, mesh: Mesh) -> Any:
    """The same of what a function of a random key returns, with its logical axis names."""
    try:
        check_divisible(config, mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    shapes = jax.eval_shape(boxed, jax.random.key(0))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        nn.meta.unbox(shapes),
        param_shardings(shapes, mesh),
    )


def _shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, abstract)


def _start(params: Params, rule: Rule) -> TrainState:
    return TrainState(jnp.int32(0), params, init_optimizer(params, rule))


def _init_policy(key: Array, config: ModelConfig) -> Params:
    return nn.meta.unbox(init_params(config, key))


def _boxed_params(config: ModelConfig, layout: Layout, key: Array) -> Params:
    if layout == "policy":
        return init_params(config, key)
    scorer = init_scorer(config, key, **_head(config, layout))
    return {"policy": init_params(config, key), "value": scorer} if layout == "actor_critic" else scorer


def _head(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    """Options of the fresh head that the layout has."""
    if layout == "step_scorer":
        return {"outputs": 2, "head_std": STEP_HEAD_STD}
    return {"outputs": 1, "head_std": reward_head_std(config) if layout == "scorer" else VALUE_HEAD_STD}
