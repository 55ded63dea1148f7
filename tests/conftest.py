"""Eight fake CPU devices, strict rank promotion and float32 products for every test."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_rank_promotion():
    """Implicit rank promotion hides shape bugs; refuse it in every test."""
    with jax.numpy_rank_promotion("raise"):
        yield
