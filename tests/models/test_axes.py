"""Every parameter names its axes, and each name has its place on a mesh of data 2, fsdp 2, tensor 2."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from models.axes import MESH_AXES, RULES, batch_sharding, check_divisible, constrain, param_shardings
from models.decode.cache import init_cache
from models.logprobs import token_logps
from models.transformer import init_params
from tests.models.tiny import CONFIG, UNTIED, make_params, make_tokens, plain, primitives_of

# Logical axes of every parameter and its shape on one of the eight devices: V 40, D 32, H 4, K 2, N 8, F 48.
EXPECTED = {
    "embed": (("vocab", "embed"), (20, 16)),
    "unembed": (("embed", "vocab"), (16, 20)),
    "final_norm.scale": (("norm",), (32,)),
    "layers.attention_norm.scale": (("layers", "norm"), (2, 32)),
    "layers.mlp_norm.scale": (("layers", "norm"), (2, 32)),
    "layers.attention.wq": (("layers", "embed", "heads", "head_dim"), (2, 16, 2, 8)),
    "layers.attention.wk": (("layers", "embed", "kv_heads", "head_dim"), (2, 16, 1, 8)),
    "layers.attention.wv": (("layers", "embed", "kv_heads", "head_dim"), (2, 16, 1, 8)),
    "layers.attention.wo": (("layers", "heads", "head_dim", "embed"), (2, 2, 8, 16)),
    "layers.mlp.gate": (("layers", "embed", "mlp"), (2, 16, 24)),
    "layers.mlp.up": (("layers", "embed", "mlp"), (2, 16, 24)),
    "layers.mlp.down": (("layers", "mlp", "embed"), (2, 24, 16)),
}


@pytest.fixture
def mesh() -> Mesh:
    return jax.make_mesh((2, 2, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def boxed() -> object:
    return jax.eval_shape(partial(init_params, UNTIED), jax.random.key(0))


def test_every_parameter_names_its_axes() -> None:
    specs = nn.get_partition_spec(boxed())
    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    found = {jax.tree_util.keystr(path, simple=True, separator="."): tuple(spec) for path, spec in leaves}
    assert found == {name: axes for name, (axes, _) in EXPECTED.items()}
    assert {axis for axes in found.values() for axis in axes} <= {name for name, _ in RULES}


def test_every_parameter_is_split_over_the_mesh(mesh: Mesh) -> None:
    placed = jax.device_put(make_params(UNTIED), param_shardings(boxed(), mesh))
    found = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.addressable_shards[0].data.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(placed)
    }
    assert found == {name: shape for name, (_, shape) in EXPECTED.items()}


def test_batch_is_split_over_data_and_fsdp(mesh: Mesh) -> None:
    placed = jax.device_put(np.arange(24).reshape(8, 3), batch_sharding(mesh))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}


def test_constraints_hold_inside_a_mesh_and_are_absent_outside(mesh: Mesh) -> None:
    params, batch = make_params(UNTIED), plain(make_tokens(UNTIED, 8, 10))
    count = lambda: list(  # noqa: E731
        primitives_of(jax.make_jaxpr(lambda p: token_logps(p, UNTIED, *batch))(params))
    ).count("sharding_constraint")
    assert count() == 0
    with jax.set_mesh(mesh):
        assert count() > 0
        x = jax.jit(lambda x: constrain(x, "batch", "length", "activation_heads", "head_dim"))(jnp.ones((8, 3, 4, 5)))
        assert x.addressable_shards[0].data.shape == (2, 3, 2, 5)
        cache = jax.jit(lambda: init_cache(UNTIED, 8, 5))()
        assert cache.layers[0].keys.addressable_shards[0].data.shape == (2, 1, 5, 8)


def test_one_device_equals_eight(mesh: Mesh, capfd: pytest.CaptureFixture[str]) -> None:
    """Values and gradients; and the partitioner never falls back to replicating an array."""
    params, batch = make_params(UNTIED), plain(make_tokens(UNTIED, 8, 10))
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((8, 10)), jnp.float32)

    def loss(params: object, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> tuple:
        scored, _ = token_logps(params, UNTIED, tokens, positions, segments)
        return jnp.sum(weights * (scored.logps + scored.entropy)), scored

    run = lambda: jax.jit(jax.value_and_grad(loss, has_aux=True))  # noqa: E731
    (_, scored), gradient = run()(params, *batch)
    shardings = param_shardings(boxed(), mesh)
    placed = jax.device_put(params, shardings)
    capfd.readouterr()
    with jax.set_mesh(mesh):
        (_, scored_8), gradient_8 = run()(placed, *jax.device_put(batch, batch_sharding(mesh)))
    jax.block_until_ready(gradient_8)
    assert "rematerialization" not in capfd.readouterr().err
    for one, eight in zip(scored, scored_8, strict=True):
        np.testing.assert_allclose(eight, one, atol=2e-5)
    for one, eight in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_8), strict=True):
        np.testing.assert_allclose(eight, one, atol=2e-5 * np.abs(one).max())


@pytest.mark.parametrize(
    "key,change",
    [
        ("num_heads", {"num_heads": 3, "num_kv_heads": 1}),
        ("num_kv_heads", {"num_kv_heads": 1}),
        ("d_ff", {"d_ff": 47}),
        ("vocab_size", {"vocab_size": 41}),
        ("d_model", {"d_model": 31}),
    ],
)
def test_indivisible_axes_are_refused(mesh: Mesh, key: str, change: dict[str, int]) -> None:
    check_divisible(CONFIG, mesh)
    with pytest.raises(ValueError, match=rf"model\.{key}: got {change[key]}, expected a multiple of mesh\.\w+=2"):
        check_divisible(dataclasses.replace(CONFIG, **change), mesh)
