"""The platform that a program is traced for, and the log of what was chosen for it."""

import functools
import logging
from typing import Literal

import jax

Platform = Literal["cpu", "gpu", "tpu"]

_LOG = logging.getLogger("temper.kernels")


def target_platform() -> Platform:
    """Where the program being traced will run: on the mesh in use, else on JAX's default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "cpu" if name == "cpu" else "tpu" if name == "tpu" else "gpu"


@functools.cache
def log_choice(choice: str, *, fallback: bool = False) -> None:
    """Logs each distinct choice once, when a program is traced; a fallback is a warning."""
    _LOG.log(logging.WARNING if fallback else logging.INFO, choice)
