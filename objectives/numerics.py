"""Masks and exponentials that never produce a NaN, shared by the objectives.

A gradient passes through both branches of a `jnp.where`, and `0 * inf` is NaN. So an objective masks its
*inputs* with `masked` before anything non-linear touches them; masking only its losses would let padding
poison the gradient.
"""

import math

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from objectives.types import Scalar

MAX_EXPONENT = 20.0
"""Nats beyond which `exp` is continued by its tangent: a ratio of e^20 = 5e8 is far outside of any clip range."""


def bool_mask(mask: Array) -> Bool[Array, "..."]:
    """The mask as booleans.

    Args:
      mask: boolean or integer (0 or 1) array of any shape.

    Raises:
      TypeError: on a floating-point mask, whose fractions would be lost; those are weights.
    """
    if jnp.issubdtype(mask.dtype, jnp.floating):
        raise TypeError(f"mask: got dtype {mask.dtype}, expected bool; per-sequence weights go in `weights`")
    return mask.astype(bool)


def masked(values: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """`values` as float32 where `mask`, else exactly 0 with zero gradient, whatever the padding holds."""
    chex.assert_equal_shape([values, mask])
    return jnp.where(bool_mask(mask), values.astype(jnp.float32), 0.0)


def guarded_exp(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`exp(x)`, continued by its tangent above `MAX_EXPONENT`.

    Unlike a clamp this neither overflows nor loses the gradient (or its sign) where it is largest.
    """
    return jnp.exp(jnp.minimum(x, MAX_EXPONENT)) + _tangent(x)


def guarded_expm1(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`guarded_exp(x) - 1`, accurate near zero."""
    return jnp.expm1(jnp.minimum(x, MAX_EXPONENT)) + _tangent(x)


def _tangent(x: Array) -> Array:
    return math.exp(MAX_EXPONENT) * jnp.maximum(x - MAX_EXPONENT, 0.0)


def require_array(array_name: str, array: Array | None, coef_name: str, coef: Scalar) -> None:
    """Refuse a coefficient whose array is missing: it would silently do nothing.

    Raises:
      ValueError: `array` is None while `coef` is anything but a literal 0 (traced ones are refused).
    """
    if array is None and not (isinstance(coef, int | float) and coef == 0):
        raise ValueError(
            f"{coef_name}: given, but it would have no effect because {array_name} is None; pass both or none"
        )
