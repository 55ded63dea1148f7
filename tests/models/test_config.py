"""The model description: its errors, its parameter count, its FLOPs."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from models.config import ModelConfig
from models.softmax import compute_logits
from models.transformer import forward, init_params, unembedding
from tests.models.tiny import CONFIG, UNTIED


def test_heads_must_divide() -> None:
    with pytest.raises(ValueError, match=r"num_kv_heads: got 3, expected a divisor of num_heads=4 because"):
        dataclasses.replace(CONFIG, num_kv_heads=3)


def test_head_dim_must_be_even() -> None:
    with pytest.raises(ValueError, match=r"head_dim: got 7, expected an even number"):
        dataclasses.replace(CONFIG, head_dim=7)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["rope_theta", "norm_eps"])
def test_numbers_must_be_finite_and_positive(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: got {value!r}, expected a finite number above 0 because"):
        dataclasses.replace(CONFIG, **{name: value})


@pytest.mark.parametrize(
    "name", ["vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "logprob_chunk"]
)
def test_sizes_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: got 0, expected at least 1"):
        dataclasses.replace(CONFIG, **{name: 0})


@pytest.mark.parametrize("name", ["remat", "param_dtype", "compute_dtype", "attention_kernel"])
def test_names_must_be_known(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: got 'fast', expected one of \w+, "):
        dataclasses.replace(CONFIG, **{name: "fast"})


def test_is_hashable_and_compares_by_value() -> None:
    assert hash(CONFIG) == hash(dataclasses.replace(CONFIG))
    assert dataclasses.replace(CONFIG) == CONFIG != UNTIED


@pytest.mark.parametrize(
    "config",
    [CONFIG, UNTIED, dataclasses.replace(CONFIG, num_kv_heads=4, head_dim=6, num_layers=3, d_ff=20)],
    ids=["tied", "untied", "other"],
)
def test_num_params_is_the_real_count(config: ModelConfig) -> None:
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    assert config.num_params() == sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_what_xla_counts(tied: bool) -> None:
    """Wide enough that products dominate; every query meets all T keys here, so the mean context is T."""
    config = ModelConfig(
        vocab_size=512, num_layers=2, d_model=128, num_heads=4, num_kv_heads=2, head_dim=32, d_ff=384,
        tie_embeddings=tied,
    )  # fmt: skip
    B, T = 1, 256

    def logits(params: object, ids: jax.Array) -> jax.Array:
        return compute_logits(forward(params, config, ids, ids, ids)[0], unembedding(params), config)

    params = jax.eval_shape(lambda key: nn.meta.unbox(init_params(config, key)), jax.random.key(0))
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
    compiled = jax.jit(logits).lower(params, ids).compile()
    assert compiled.cost_analysis()["flops"] / (B * T) == pytest.approx(config.flops_per_token(T), rel=0.05)


def test_defaults_are_those_of_the_first_llama() -> None:
    assert (ModelConfig.rope_theta, ModelConfig.norm_eps) == (10_000.0, 1e-5)
