"""Products of one row by parts of the inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import products
from models.products import matrix_product

OUTPUTS = 256


@pytest.mark.parametrize("inputs", [288, 287])
@pytest.mark.parametrize("rows", [1, 2])
def test_values_and_gradients_are_those_of_one_product(rows: int, inputs: int) -> None:
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    w = rng.normal(size=(inputs, OUTPUTS)).astype(np.float32)
    cotangent = rng.normal(size=(rows, OUTPUTS)).astype(np.float32)
    run = jax.jit(lambda x, w: jax.vjp(lambda *args: matrix_product(*args, jnp.float32), x, w)[1](cotangent))
    np.testing.assert_allclose(matrix_product(x, w, jnp.float32), x @ w, rtol=1e-5, atol=1e-5)
    found = run(x, w)
    np.testing.assert_allclose(found[0], cotangent @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[1], x.T @ cotangent, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_bfloat16_is_summed_in_float32(rows: int) -> None:
    """1,024 times 1 + 1/128: a bfloat16 sum would stop growing at 256."""
    x = jnp.full((rows, 1024), 1 + 2**-7, jnp.bfloat16)
    w = jnp.ones((1024, OUTPUTS), jnp.bfloat16)
    assert matrix_product(x, w, jnp.bfloat16).dtype == jnp.bfloat16
    np.testing.assert_array_equal(matrix_product(x, w, jnp.float32), np.full((rows, OUTPUTS), 1032.0))


def test_one_row_and_a_large_matrix_are_a_batch_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what runs on more than one core."""
    monkeypatch.setattr(products.os, "cpu_count", lambda: 4)

    def parts(rows: int, outputs: int) -> bool:
        lower = jax.jit(lambda x, w: matrix_product(x, w, jnp.float32)).lower
        return "tensor<4x72x" in lower(jnp.ones((rows, 288)), jnp.ones((288, outputs))).as_text()

    assert parts(1, OUTPUTS) and not parts(2, OUTPUTS) and not parts(1, 16)
