"""Settings of the process under which XLA computes faster on CPU cores. Once, before JAX has devices."""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

import jaxlib.version

_NO_YNNPACK = "--xla_cpu_experimental_ynn_fusion_type="
"""Matrix products by Eigen: of a training step YNNPACK's take a quarter to a half longer."""

_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD = -8, -4, -1  # names of glibc's malloc.h


def tune_cpu() -> None:
    """Sets XLA's flags and, where there is no accelerator, how freed memory is kept."""
    flags = os.environ.get("XLA_FLAGS", "")
    # An unknown flag ends the process, so only versions that are known to have it.
    if "ynn_fusion_type" not in flags and jaxlib.version.__version_info__ < (0, 13):
        os.environ["XLA_FLAGS"] = f"{flags} {_NO_YNNPACK}".strip()
    if not _may_have_accelerator():
        keep_memory()


def keep_memory() -> None:
    """Keeps freed memory in the process: every step allocates as much again, and the kernel clears each new page.

    Does nothing without glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def _may_have_accelerator() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms != "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or any(importlib.util.find_spec(name) for name in ("libtpu", "jax_plugins"))
