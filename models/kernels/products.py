"""Matrix products and sums, shaped as the platform computes them fastest.

Shapes: R rows, I inputs, O outputs, P parts of the inputs.
"""

import math
import os
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.kernels.dispatch import log_choice, target_platform

MASKED_SCORE = float(jnp.finfo(jnp.float32).min)
"""The score of a masked key: finite, so that a query that sees no key gives no NaN."""

einsum_float32 = partial(jnp.einsum, preferred_element_type=jnp.float32)
"""Sums and result in float32, whatever the operands' dtype."""

_LEAST_ENTRIES = 2**16
"""Of a matrix: below, all cores take longer to meet than one to finish."""

_MOST_PARTS = 8


def einsum(
    spec: str,
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    *,
    scale: Float[Array, "..."] | None = None,
    dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """`einsum(spec, x, w)` of activations with weights `w`, in the dtype of `x` or a smaller one.

    `spec` sums over the last axes of `x`, which are the first ones of `w`. `dtype` is the result's, by default that of
    `x`; where it is float32, sums are too. int8 weights have a `scale`, one factor for each output: they are exact in
    bfloat16, so only the float32 sum is scaled and rounded.
    """
    dtype = x.dtype if dtype is None else dtype
    if w.dtype.itemsize < x.dtype.itemsize:
        # Tied to this step's input: XLA would otherwise convert the weights once, before a loop over decode steps,
        # and keep them in the large dtype beside the small one.
        x, w = jax.lax.optimization_barrier((x, w))
    product = _flat_einsum if target_platform() == "cpu" else jnp.einsum
    log_choice(f"matrix products: {product.__name__.strip('_')} on {target_platform()}")
    out = product(spec, x, w.astype(x.dtype), preferred_element_type=dtype if scale is None else jnp.float32)
    if scale is not None:
        out = out * scale.reshape((1,) * (out.ndim - scale.ndim) + scale.shape)
    return out.astype(dtype)


def _flat_einsum(spec: str, x: Array, w: Array, preferred_element_type: DTypeLike) -> Array:
    """As one product of two matrices: XLA's CPU backend runs the gradients of batched ones 3x slower."""
    operands, outputs = spec.split("->")
    summed = sum(axis not in outputs for axis in operands.split(",")[1])
    inputs = math.prod(w.shape[:summed])
    out_RO = _matmul(x.reshape(-1, inputs), w.reshape(inputs, -1), preferred_element_type)
    return out_RO.reshape(*x.shape[: x.ndim - summed], *w.shape[summed:])


def _matmul(x_RI: Float[Array, "R I"], w_IO: Float[Array, "I O"], dtype: DTypeLike) -> Float[Array, "R O"]:
    """`x @ w`; of a single row as a sum over parts of the inputs, one for each core.

    XLA's CPU backend runs the product of one row on one core, and a batch of products on all of them.
    """
    parts = 2 ** min(os.cpu_count() or 1, _MOST_PARTS).bit_length() // 2
    if x_RI.shape[0] > 1 or parts == 1 or w_IO.size < _LEAST_ENTRIES or x_RI.shape[1] % parts:
        return jnp.matmul(x_RI, w_IO, preferred_element_type=dtype)
    x_P1I, w_PIO = x_RI.reshape(parts, 1, -1), w_IO.reshape(parts, -1, w_IO.shape[1])
    return jnp.sum(einsum_float32("PRI,PIO->PRO", x_P1I, w_PIO), axis=0).astype(dtype)


def sum_last(x: Float[Array, "... V"]) -> Float[Array, "..."]:
    """Sum over the last axis; on a CPU a product with ones, four times as fast as XLA's reduction."""
    if target_platform() != "cpu":
        return jnp.sum(x, axis=-1)
    ones = jnp.ones((x.shape[-1],), x.dtype)
    flat = jnp.matmul(x.reshape(-1, x.shape[-1]), ones, precision=jax.lax.Precision.HIGHEST)
    return flat.reshape(x.shape[:-1])


def computed_once(x: Float[Array, "... N"]) -> Float[Array, "... N"]:
    """The same values, not computed again by each reader.

    On a CPU a product with the identity: XLA fuses a table of sines into each rotation that reads it, and computes it
    anew for every head and layer, a tenth of a decode step.
    """
    if target_platform() != "cpu":
        return x
    return jnp.matmul(x, jnp.eye(x.shape[-1], dtype=x.dtype), precision=jax.lax.Precision.HIGHEST)
