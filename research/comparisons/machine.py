"""The machine as a system under test: what its limits are at the moment, measured beside the others.

Bandwidth: reading an array of the workload's size, float32 on a CPU and the compute dtype elsewhere, once: by a jitted
matrix-vector product, a jitted sum and, on a CPU, `numpy.dot` of one slice a thread. FLOP/s: the product of two
matrices, eight times as wide as the model, in the compute dtype. The fastest of a few tries counts, not the median: a
limit is what the machine can do when nothing disturbs it.
"""

import importlib.metadata
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_TRIES = 5
_WIDTH = 1024
"""Columns of the array that is read as a matrix."""


def main(work: Mapping[str, Any], say: Callable[..., None]) -> None:
    """Serves one workload."""
    with jax.default_device(jax.devices(work["platform"])[0]):
        dtype = jnp.dtype(work["model"]["compute_dtype"])
        rows = max(int(work["read_bytes"]) // (dtype.itemsize * _WIDTH), work["threads"])
        matrix, vector = jnp.ones((rows, _WIDTH), dtype), jnp.ones((_WIDTH,), dtype)
        n = 8 * work["model"]["d_model"]
        square = jnp.ones((n, n), dtype)
    multiply, add = jax.jit(jnp.matmul), jax.jit(lambda m: jnp.sum(m, dtype=jnp.float32))
    readers: list[Callable[[], object]] = [
        lambda: multiply(matrix, vector).block_until_ready(),
        lambda: add(matrix).block_until_ready(),
    ]
    if work["platform"] == "cpu" and dtype == jnp.float32:  # numpy has no fast product in other dtypes
        slices = np.array_split(np.ones(rows * _WIDTH, np.float32), work["threads"])
        pool = ThreadPoolExecutor(work["threads"])
        readers.append(lambda: list(pool.map(lambda part: part @ part, slices)))
    say(parameters=0, versions={"jax": importlib.metadata.version("jax")})
    while True:
        say(
            bandwidth=matrix.nbytes / min(map(_fastest, readers)),
            flops=2.0 * n**3 / _fastest(lambda: multiply(square, square).block_until_ready()),
        )


def _fastest(function: Callable[[], object]) -> float:
    """Seconds."""
    times = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
