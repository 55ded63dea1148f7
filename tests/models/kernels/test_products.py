"""Products and sums as each platform computes them: the same values, and the shapes that were chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.kernels import products
from models.kernels.products import computed_once, einsum, sum_last
from tests.models.kernels.platforms import on

OUTPUTS = 256
SPEC = "RI,IO->RO"


@pytest.mark.parametrize("inputs", [288, 287])
@pytest.mark.parametrize("rows", [1, 2])
def test_values_and_gradients_are_those_of_one_product(rows: int, inputs: int) -> None:
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    w = rng.normal(size=(inputs, OUTPUTS)).astype(np.float32)
    cotangent = rng.normal(size=(rows, OUTPUTS)).astype(np.float32)
    run = jax.jit(lambda x, w: jax.vjp(lambda *args: einsum(SPEC, *args), x, w)[1](cotangent))
    np.testing.assert_allclose(einsum(SPEC, x, w), x @ w, rtol=1e-5, atol=1e-5)
    found = run(x, w)
    np.testing.assert_allclose(found[0], cotangent @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[1], x.T @ cotangent, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_bfloat16_is_summed_in_float32(rows: int) -> None:
    """1,024 times 1 + 1/128: a bfloat16 sum would stop growing at 256."""
    x = jnp.full((rows, 1024), 1 + 2**-7, jnp.bfloat16)
    w = jnp.ones((1024, OUTPUTS), jnp.bfloat16)
    assert einsum(SPEC, x, w).dtype == jnp.bfloat16
    np.testing.assert_array_equal(einsum(SPEC, x, w, dtype=jnp.float32), np.full((rows, OUTPUTS), 1032.0))


def test_one_row_and_a_large_matrix_are_a_batch_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what runs on more than one core."""
    monkeypatch.setattr(products.os, "cpu_count", lambda: 4)

    def parts(rows: int, outputs: int) -> bool:
        lower = jax.jit(lambda x, w: einsum(SPEC, x, w, dtype=jnp.float32)).lower
        return "tensor<4x72x" in lower(jnp.ones((rows, 288)), jnp.ones((288, outputs))).as_text()

    assert parts(1, OUTPUTS) and not parts(2, OUTPUTS) and not parts(1, 16)


def test_other_platforms_take_plain_einsums_and_sums_of_the_same_values() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 3, 5, 4)).astype(np.float32), rng.normal(size=(5, 4, 7)).astype(np.float32)

    def run(x: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
        return einsum("BTHN,HND->BTD", x, w), sum_last(x), computed_once(x)

    with on("tpu"):
        plain = jax.make_jaxpr(run)(x, w)
    flat = jax.make_jaxpr(run)(x, w)
    products = [
        [eqn.invars[0].aval.shape for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
        for jaxpr in (plain.jaxpr, flat.jaxpr)
    ]
    assert products == [[(2, 3, 5, 4)], [(6, 20), (30, 4), (2, 3, 5, 4)]]
    for found, expected in zip(jax.core.eval_jaxpr(plain.jaxpr, plain.consts, x, w), run(x, w), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
