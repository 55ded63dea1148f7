"""Masks and exponentials that never produce a NaN, and the refusal of options that would do nothing.

A gradient passes through both branches of a `jnp.where`, and `0 * inf` is NaN. So an objective masks its *inputs* with
`masked` before anything non-linear touches them; masking only its losses would let padding poison the gradient.
"""

import math
from collections.abc import Collection, Mapping

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from objectives.types import Scalar

MAX_EXPONENT = 20.0  # nats beyond which `exp` is continued by its tangent: e^20 = 5e8 is far outside any clip range


def bool_mask(mask: Array) -> Bool[Array, "..."]:
    """A bool or integer (0 or 1) mask as bool; a TypeError on floats, whose fractions would be lost."""
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


def is_literal_zero(scalar: Scalar) -> bool:
    """Whether a coefficient is off for certain; a traced one never is."""
    return isinstance(scalar, int | float) and scalar == 0


def require_array(array_name: str, array: Array | None, coef_name: str, coef: Scalar) -> None:
    """Raises ValueError where a coefficient (traced or not 0) lacks its array: it would silently do nothing."""
    if array is None and not is_literal_zero(coef):
        raise ValueError(
            f"{coef_name}: given, but it would have no effect because {array_name} is None; pass both or none"
        )


def refuse_unused(given: Mapping[str, bool], used: Collection[str], variant: str) -> None:
    """Raises ValueError where an option is given (by name: whether it is) that the chosen variant does not use."""
    for name, is_given in given.items():
        if is_given and name not in used:
            raise ValueError(f"{name}: given, but it would have no effect with {variant}")
