"""A tiny decoder for tests: two layers, width 32, every parameter moved away from its initial value."""

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.groups import Group
from models.transformer import Params, forward, init_params

CONFIG = ModelConfig(
    vocab_size=40,
    num_layers=2,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
    rope_theta=100.0,
    logprob_chunk=4,
)
ONE_LAYER = dataclasses.replace(CONFIG, num_layers=1)
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)


@cache
def make_params(config: ModelConfig, seed: int = 0, spread: float = 0.25) -> Params:
    """Unboxed parameters with logits of standard deviation about `spread * sqrt(D)` and norm scales off 1.

    Drawn by NumPy into the shapes of `init_params`: to compile that takes ten seconds on a CPU.
    """
    shapes = jax.eval_shape(lambda key: nn.meta.unbox(init_params(config, key)), jax.random.key(0))
    noise = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name, value = jax.tree_util.keystr(path), noise.standard_normal(leaf.shape)
        if "scale" in name:
            value = 1.0 + 0.3 * value
        elif "embed" in name:
            value = spread * value
        else:
            value = value / np.sqrt(config.d_model)
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def hidden_states(params: Params, config: ModelConfig, *rows: jax.Array, group: Group | None = None) -> jax.Array:
    """What `forward` returns first."""
    return forward(params, config, *rows, group=group)[0]


def make_tokens(config: ModelConfig, rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Uniform token ids `[rows, length]`."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length), dtype=np.int32)


def plain(tokens: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, positions and segment ids of rows that are one document each, without padding."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return jnp.asarray(tokens), jnp.asarray(positions), jnp.ones(tokens.shape, jnp.int32)


def left_padded(prompts: list[np.ndarray], width: int, fill: int = 0) -> tuple[np.ndarray, ...]:
    """Tokens, positions and segment ids of prompts pushed to the right of `width` slots."""
    tokens = np.full((len(prompts), width), fill, np.int32)
    segments = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        segments[row, width - len(prompt) :] = 1
    return tokens, np.maximum(np.cumsum(segments, axis=1, dtype=np.int32) - 1, 0), segments


def right_padded(prompts: list[np.ndarray], width: int) -> tuple[np.ndarray, ...]:
    """Tokens, positions and segment ids of rows pushed to the left of `width` slots."""
    tokens, segments = np.zeros((2, len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        segments[row, : len(prompt)] = 1
    return tokens, np.maximum(np.cumsum(segments, axis=1, dtype=np.int32) - 1, 0), segments


def equations_of(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr and of the jaxprs inside it."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from equations_of(inner)


def values_of(jaxpr: Any) -> Iterator[Any]:
    """The abstract value of everything computed in a jaxpr and in the jaxprs inside it."""
    return (var.aval for equation in equations_of(jaxpr) for var in equation.outvars)


def primitives_of(jaxpr: Any) -> Iterator[str]:
    """The name of every primitive in a jaxpr and in the jaxprs inside it."""
    return (equation.primitive.name for equation in equations_of(jaxpr))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")
