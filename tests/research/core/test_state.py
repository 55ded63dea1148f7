"""The state lies on the mesh as promised, from its first moment and through every update."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from research.config.optimizers import ADAMW
from research.core.errors import ConfigError
from research.core.mesh import make_mesh
from research.core.optim import init_optimizer
from research.core.state import abstract_state, fresh_policy, state_from_params
from tests.research.algorithms.toy import MODEL, eight_devices, host_params, one_device, quick_compilation


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with quick_compilation():
        yield


def test_initialisation_has_the_promised_shapes_and_shardings_and_ignores_the_mesh() -> None:
    mesh = eight_devices()
    state = state_from_params(fresh_policy(MODEL, mesh, 3), MODEL, mesh, ADAMW)
    abstract = abstract_state(MODEL, mesh, ADAMW)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for (path, leaf), promised in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(abstract), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert (leaf.shape, leaf.dtype) == (promised.shape, promised.dtype), name
        assert leaf.sharding.is_equivalent_to(promised.sharding, leaf.ndim), name
    one = fresh_policy(MODEL, one_device(), 3)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_parameters_and_their_moments_are_really_split() -> None:
    mesh = eight_devices()
    state = state_from_params(host_params(), MODEL, mesh, ADAMW)
    embed = state.params["embed"]
    assert {shard.data.shape for shard in embed.addressable_shards} == {(MODEL.vocab_size // 2, MODEL.d_model // 2)}
    assert state.opt_state[1][0].mu["embed"].sharding.is_equivalent_to(embed.sharding, 2)
    assert state.opt_state[1][0].nu["embed"].sharding.is_equivalent_to(embed.sharding, 2)
    assert int(state.step) == 0 and not np.any(state.opt_state[1][0].mu["embed"])
    np.testing.assert_array_equal(embed, host_params()["embed"])


def test_init_optimizer_keeps_boxes() -> None:
    import flax.linen as nn

    boxed = {"w": nn.LogicallyPartitioned(np.ones((2, 2), np.float32), ("embed", "mlp"))}
    assert init_optimizer(boxed, ADAMW)[1][0].mu["w"].names == ("embed", "mlp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 23}, r"model\.vocab_size: got 23, expected a multiple of mesh\.tensor=2"),
        ({"num_heads": 3, "num_kv_heads": 3}, r"model\.num_heads: got 3"),
        ({"num_kv_heads": 1}, r"model\.num_kv_heads: got 1"),
        ({"d_ff": 25}, r"model\.d_ff: got 25"),
        ({"d_model": 15}, r"model\.d_model: got 15, expected a multiple of mesh\.fsdp=2"),
    ],
)
def test_a_model_that_does_not_divide_is_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        abstract_state(dataclasses.replace(MODEL, **change), make_mesh(2, 2, 2), ADAMW)
