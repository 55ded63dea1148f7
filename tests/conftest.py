"""Eight fake CPU devices, strict rank promotion, quick compilation."""

import os
from pathlib import Path

from research.core.cpu import jaxlib_version

# Tiny programs: compiling them is most of a test's time, so XLA's backend does not optimise them, and emits loops by
# its older emitters, which take less than half as long, as long as it has them.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        *(["--xla_cpu_use_fusion_emitters=false"] if jaxlib_version() < (0, 11) else []),
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # commands would write to the user's

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_rank_promotion():
    """Implicit rank promotion hides shape bugs; refuse it in every test."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="module")
def bounded_programs():
    """Forgets compiled programs in time: each takes mappings of memory, and at Linux's 65,530 XLA ends the process."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
