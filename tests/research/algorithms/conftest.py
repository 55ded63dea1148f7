"""Quick compilation on one device for every test of an algorithm, and the two policies they compare."""

from collections.abc import Iterator
from typing import Any

import jax
import pytest

from tests.research.algorithms.toy import host_params, one_device, quick_compilation


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with quick_compilation(), jax.set_mesh(one_device()):
        yield


@pytest.fixture(scope="session")
def policy() -> Any:
    return host_params()


@pytest.fixture(scope="session")
def reference() -> Any:
    """The reference of `toy.frozen_models`."""
    return host_params(seed=7)
