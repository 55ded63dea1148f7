"""Masks that let nothing through, and exponentials that keep value and gradient where `exp` overflows."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.numerics import bool_mask, guarded_exp, guarded_expm1, masked, require_array
from tests.objectives.cases import SEEDS, SHAPES, fill, random_logps, random_mask

jit_masked = jax.jit(masked)


def test_masked_golden():
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        shape = SHAPES[seed % len(SHAPES)]
        values, mask = random_logps(rng, *shape), random_mask(rng, *shape)
        got = jit_masked(fill(values, mask), mask)
        for b in range(shape[0]):
            for t in range(shape[1]):
                assert got[b, t] == (values[b, t] if mask[b, t] else 0.0)


def test_masked_slots_pass_no_gradient_and_bfloat16_becomes_float32():
    values, mask = jnp.array([[2.0, jnp.nan, 3.0]], jnp.bfloat16), jnp.array([[1, 0, 1]])
    assert masked(values, mask).dtype == jnp.float32
    gradient = jax.grad(lambda x: jnp.square(masked(x, mask)).sum())(values)
    np.testing.assert_array_equal(gradient.astype(jnp.float32), [[4.0, 0.0, 6.0]])


@pytest.mark.parametrize(("function", "at_zero"), [(guarded_exp, 1.0), (guarded_expm1, 0.0)])
def test_exponentials_continue_by_their_tangent_at_20_nats(function, at_zero):
    x = np.array([-50.0, -1.0, 0.0, 5.0, 19.9, 20.5, 30.0, 1e4], np.float32)
    value, slope = jax.vmap(jax.value_and_grad(function))(jnp.asarray(x))
    top = math.exp(20.0)
    values = [math.exp(a) if a <= 20 else top * (a - 19.0) for a in map(float, x)]
    np.testing.assert_allclose(value, np.array(values) - (1.0 - at_zero), rtol=1e-5)
    np.testing.assert_allclose(slope, [math.exp(min(a, 20.0)) for a in map(float, x)], rtol=1e-5, atol=1e-6)


def test_expm1_keeps_its_digits_near_zero():
    x = jnp.array([1e-6, -1e-6])
    np.testing.assert_allclose(guarded_expm1(x), [math.expm1(1e-6), math.expm1(-1e-6)], rtol=1e-6)


def test_refusals():
    with pytest.raises(TypeError, match="mask: got dtype float32, expected bool"):
        bool_mask(jnp.ones(2))
    with pytest.raises(AssertionError):
        masked(jnp.ones((2, 3)), jnp.ones((1, 3), bool))
    for coef in (0.1, 1, jnp.zeros(())):  # whether an array is 0 is not known when traced
        with pytest.raises(ValueError, match="beta: given, but it would have no effect because ref is None"):
            require_array("ref", None, "beta", coef)
    require_array("ref", None, "beta", 0.0)
    require_array("ref", jnp.ones(1), "beta", 0.1)
