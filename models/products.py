"""Products that are summed in float32, and that of one row with a matrix as XLA's CPU backend runs it on all cores.

Shapes: R rows, I inputs, O outputs, S parts of the inputs.
"""

import os
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

einsum_float32 = partial(jnp.einsum, preferred_element_type=jnp.float32)
"""Sums and result in float32, whatever the operands' dtype."""

_LEAST_ENTRIES = 2**16
"""Of a matrix: below, all cores take longer to meet than one to finish."""

_MOST_PARTS = 8


def matrix_product(
    x_RI: Float[Array, "R I"], w_IO: Float[Array, "I O"], dtype: DTypeLike
) -> Float[Array, "R O"]:
    """`x @ w`, summed in float32 where `dtype` is.

    A CPU computes a single row as a sum of products over parts of the inputs, one for each core: the backend runs the
    product of one row on one core, and those of a batch on all of them.
    """
    plain = partial(jnp.matmul, preferred_element_type=dtype)
    parts = 2 ** min(os.cpu_count() or 1, _MOST_PARTS).bit_length() // 2
    if x_RI.shape[0] > 1 or parts == 1 or w_IO.size < _LEAST_ENTRIES or x_RI.shape[1] % parts:
        return plain(x_RI, w_IO)
    return jax.lax.platform_dependent(x_RI, w_IO, cpu=partial(_by_parts, parts, dtype), default=plain)


def _by_parts(parts: int, dtype: DTypeLike, x_1I: Array, w_IO: Array) -> Array:
    x_S1I, w_SIO = x_1I.reshape(parts, 1, -1), w_IO.reshape(parts, -1, w_IO.shape[1])
    return jnp.sum(einsum_float32("sri,sio->sro", x_S1I, w_SIO), axis=0).astype(dtype)
