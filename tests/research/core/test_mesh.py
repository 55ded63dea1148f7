"""Mesh shapes, and the sentences that refuse those that cannot be."""

import jax
import numpy as np
import pytest

from models.axes import MESH_AXES
from research.core.errors import ConfigError
from research.core.mesh import check_rows, make_mesh, to_device


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 2, -1), (1, 2, 4)), ((2, 2, 2), (2, 2, 2))],
)
def test_shapes(sizes: tuple[int, int, int], shape: tuple[int, int, int]) -> None:
    mesh = make_mesh(*sizes)
    assert mesh.axis_names == MESH_AXES and mesh.devices.shape == shape


def test_over_some_devices_only() -> None:
    assert make_mesh(-1, 1, 1, devices=jax.devices()[:3]).devices.size == 3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), "mesh: got data=3 x fsdp=1 x tensor=1, expected a product of 8 because this machine has 8 cpu"),
        ((-1, 3, 1), "expected a product of 8"),
        ((-1, -1, 1), "at most one -1"),
        ((0, 1, 1), "at least 1"),
        ((-2, 1, 1), "at least 1"),
        ((-1, 0, 1), "at least 1"),
        ((16, 1, 1), "expected a product of 8"),
    ],
)
def test_impossible_shapes(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_mesh(*sizes)


def test_batches_are_split_along_the_first_axis() -> None:
    mesh = make_mesh(2, 2, 2)
    batch = to_device(mesh, {"x": np.arange(16).reshape(8, 2), "w": np.ones(8)})
    assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(2, 2)}
    assert {shard.data.shape for shard in batch["w"].addressable_shards} == {(2,)}


def test_rows_must_divide() -> None:
    mesh = make_mesh(2, 2, 2)
    check_rows(mesh, "sft.batch_size", 16, micro_batches=4)
    with pytest.raises(ConfigError, match=r"sft\.batch_size: got 6 rows, expected a multiple of 4 .*mesh\.data=2 x"):
        check_rows(mesh, "sft.batch_size", 6)
    with pytest.raises(ConfigError, match=r"got 8 rows, expected a multiple of 16 .*micro_batches=4"):
        check_rows(mesh, "sft.batch_size", 8, micro_batches=4)
    check_rows(mesh, "rl.rollout.prompts_per_step", 16, micro_batches=2, minibatches=2)
    with pytest.raises(ConfigError, match=r"got 12 rows, expected a multiple of 8 .*rollout\.minibatches=2"):
        check_rows(mesh, "rl.rollout.prompts_per_step", 12, minibatches=2)


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'cuda'")])
def test_a_platform_that_is_missing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def missing() -> int:
        raise error

    monkeypatch.setattr(jax, "device_count", missing)
    with pytest.raises(ConfigError, match=r"^JAX_PLATFORMS: got .*, expected platforms that this machine"):
        make_mesh(-1, 1, 1)
