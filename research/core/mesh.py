"""One mesh for everything: `data`, `fsdp` and `tensor` axes over the devices at hand."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from models.axes import MESH_AXES, batch_sharding, batch_ways
from research.core.errors import ConfigError


def make_mesh(data: int, fsdp: int, tensor: int, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `devices` (all of them by default); one of the sizes may be -1, meaning all devices left over.

    The batch is split over `data` and `fsdp`, the parameters over `fsdp`, heads, hidden width and vocabulary over
    `tensor`. ConfigError where the sizes do not multiply to the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    try:
        count = jax.device_count() if devices is None else len(devices)
    except (AssertionError, RuntimeError) as error:  # JAX says either where a platform it must use is missing
        raise ConfigError(
            f"JAX_PLATFORMS: got {os.environ.get('JAX_PLATFORMS', '')!r}, expected platforms that "
            "this machine and the installed JAX have"
        ) from error
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    shown = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"mesh: got {shown}, expected sizes of at least 1 and at most one -1")
    if free and count % fixed == 0:
        sizes[free[0]] = count // fixed
    elif free or fixed != count:
        raise ConfigError(
            f"mesh: got {shown}, expected a product of {count} because this machine has {count} "
            f"{jax.default_backend()} device{'s' if count > 1 else ''}; set one axis to -1 to fill in the rest"
        )
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def to_device(mesh: Mesh, batch: Any) -> Any:
    """Puts a tree of host arrays on the mesh, split along the first axis."""
    return jax.device_put(batch, batch_sharding(mesh))


def check_rows(mesh: Mesh, key: str, rows: int, micro_batches: int = 1, minibatches: int = 1) -> None:
    """Raises ConfigError where `rows` cannot be split over the mesh, the mini-batches and their micro-batches."""
    ways = batch_ways(mesh) * micro_batches * minibatches
    if rows % ways:
        raise ConfigError(
            f"{key}: got {rows} rows, expected a multiple of {ways} because rows are split over mesh.data="
            f"{mesh.shape['data']} x mesh.fsdp={mesh.shape['fsdp']} x micro_batches={micro_batches}"
            + (f" x rollout.minibatches={minibatches}" if minibatches > 1 else "")
        )
