"""Settings under which XLA computes faster on CPU cores."""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD = -8, -4, -1  # names of glibc's malloc.h
_YNNPACK = "xla_cpu_experimental_ynn_fusion_type"


def training_options() -> dict[str, str | int]:
    """Compiler options of programs over whole rows: those of `decoding_options` and, if any, products by Eigen.

    jaxlib 0.10 to 0.12 picks YNNPACK, whose large products take a quarter to a half longer; its small ones, of
    decoding, are the faster ones.
    """
    options = decoding_options()
    return {**options, _YNNPACK: ""} if options else options


def decoding_options() -> dict[str, str | int]:
    """Compiler options of programs that decode; empty where there may be an accelerator, or an option is unknown.

    Vectors as wide as the cores have them, where XLA prefers 256 bits: what is no product is a quarter of a training
    step, and more of a decode step. YNNPACK for products only: one row is decoded in 6 to 7% less time.
    """
    if may_have_accelerator() or jaxlib_version() >= (0, 13):
        return {}
    return {"xla_cpu_prefer_vector_width": 512, _YNNPACK: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


def jaxlib_version() -> tuple[int, ...]:
    """(major, minor), without importing jaxlib. XLA ends the process at a flag that it does not know."""
    return tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2])


def keep_memory() -> None:
    """Keeps freed memory in the process: every step allocates as much again, and the kernel clears each new page.

    For commands, before they import anything that starts threads: their memory is not reached. Does nothing where there
    may be an accelerator, or without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None and not may_have_accelerator():
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)  # never trims; any number ends at 2 GiB, and large steps free more


def may_have_accelerator() -> bool:
    """Whether JAX may compute on anything but CPU cores; does not start it."""
    if platforms := os.environ.get("JAX_PLATFORMS", ""):
        return platforms != "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or any(importlib.util.find_spec(name) for name in ("libtpu", "jax_plugins"))
