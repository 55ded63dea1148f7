"""The machine as a system under test: what its limits are at the moment, measured beside the others.

Bandwidth: reading an array of the workload's size, float32 on a CPU and the compute dtype elsewhere, once; a jitted
matrix-vector product, a jitted sum and, on a CPU, `numpy.dot` of one slice a thread are tried, and the fastest read of
any counts. FLOP/s: the fastest of a few products of two large matrices in the compute dtype. The fastest, not the
median: a limit is what the machine can do when nothing disturbs it.
"""

import importlib.metadata
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from research.benchmarks.systems.channel import Channel

_TRIES = 5
_WIDTH = 1024
"""Columns of the array that is read as a matrix."""


def main() -> None:
    """Serves one workload."""
    channel = Channel()
    work = channel.workload
    with jax.default_device(jax.devices(work["platform"])[0]):
        dtype = jnp.dtype(ModelConfig(**work["model"]).compute_dtype)
        readers, size = _readers(int(work["read_bytes"]), dtype, work["platform"], work["threads"])
        product, flops = _product(work["matmul_size"], dtype)

    def lap() -> dict[str, float]:
        bandwidth = max(size / _fastest(read) for read in readers)
        return {"bandwidth": bandwidth, "flops": flops / _fastest(product)}

    channel.describe(parameters=0, versions={"jax": importlib.metadata.version("jax")})
    channel.repeat(lap)


def _readers(
    size: int, dtype: jnp.dtype, platform: str, threads: int
) -> tuple[list[Callable[[], object]], int]:
    """Functions that read one array once and wait for it, and its size in bytes."""
    rows = max(size // (dtype.itemsize * _WIDTH), threads)
    matrix, vector = jnp.ones((rows, _WIDTH), dtype), jnp.ones((_WIDTH,), dtype)
    multiply = jax.jit(lambda m, v: m @ v)
    add = jax.jit(lambda m: jnp.sum(m, dtype=jnp.float32))
    readers: list[Callable[[], object]] = [
        lambda: multiply(matrix, vector).block_until_ready(),
        lambda: add(matrix).block_until_ready(),
    ]
    if platform == "cpu" and dtype == jnp.float32:  # numpy has no fast product in other dtypes
        slices = np.array_split(np.ones(rows * _WIDTH, np.float32), threads)
        pool = ThreadPoolExecutor(threads)
        readers.append(lambda: list(pool.map(lambda part: part @ part, slices)))
    return readers, rows * _WIDTH * dtype.itemsize


def _product(n: int, dtype: jnp.dtype) -> tuple[Callable[[], object], float]:
    """A product of two n x n matrices, and its FLOPs."""
    matrix = jnp.ones((n, n), dtype)
    multiply = jax.jit(jnp.matmul)
    return lambda: multiply(matrix, matrix).block_until_ready(), 2.0 * n**3


def _fastest(function: Callable[[], object]) -> float:
    """Seconds."""
    times = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
