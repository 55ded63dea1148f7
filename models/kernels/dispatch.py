"""What every choice between implementations rests on: the platform of a program, and one log line a choice.

Choices are made while a program is traced, from the platform, shapes and dtypes.
"""

import functools
import logging
from typing import Literal, NamedTuple

import jax

Platform = Literal["cpu", "gpu", "tpu"]

_LOG = logging.getLogger("temper.kernels")


def target_platform() -> Platform:
    """Where the program being traced will run: on the mesh in use, else on JAX's default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "cpu" if name == "cpu" else "tpu" if name == "tpu" else "gpu"


class Choice(NamedTuple):
    """An implementation of an operation on a platform.

    Attributes:
      operation: what is computed.
      kernel: the implementation's name.
      platform: where.
      about: the shapes and the dtype that decided.
      note: what a user may want to know, such as padding.
      refusal: why it is not the platform's fastest; "" where it is.
    """

    operation: str
    kernel: str
    platform: Platform
    about: str = ""
    note: str = ""
    refusal: str = ""


@functools.cache
def log_choice(choice: Choice) -> None:
    """Logs each distinct choice once, a fallback as a warning."""
    level = logging.WARNING if choice.refusal else logging.INFO
    parts = [f"{choice.kernel} on {choice.platform}", choice.about, choice.note, choice.refusal]
    _LOG.log(level, "%s: %s", choice.operation, "; ".join(part for part in parts if part))
