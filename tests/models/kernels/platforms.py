"""Programs for platforms that are not here."""

from contextlib import AbstractContextManager

import jax

from models.axes import MESH_AXES

AUTO = (jax.sharding.AxisType.Auto,) * 3


def on(platform: str) -> AbstractContextManager[None]:
    """A context in which programs are traced for one device of a platform."""
    device = jax.sharding.AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    mesh = jax.sharding.AbstractMesh((1, 1, 1), MESH_AXES, axis_types=AUTO, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)
