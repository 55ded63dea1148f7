"""Auxiliary sums: nothing for a dense model; of a model that has some, the sums over its layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.heads import scorer_outputs
from models.layers import AuxSums, Block, Rope
from models.logprobs import token_logps
from models.transformer import forward, unstack_layers
from tests.models.tiny import CONFIG, make_params, make_tokens, plain

ROWS = plain(make_tokens(CONFIG, 3, 9))


class SquareBlock(Block):
    """A block that reports the sum of squares that it returns, and how many tokens each of three experts got."""

    def __call__(self, x_BTD: jax.Array, rope: Rope, segment_ids_BT: jax.Array, *cached: None) -> tuple:
        x_BTD, (_, cache) = super().__call__(x_BTD, rope, segment_ids_BT, *cached)
        total, count = jnp.sum(x_BTD**2), jnp.float32(x_BTD.shape[0] * x_BTD.shape[1])
        return x_BTD, (AuxSums({"square": (total, count)}, {"experts": jnp.arange(3.0)}), cache)


def test_a_dense_model_has_none_and_pays_nothing() -> None:
    params = make_params(CONFIG)
    _, aux = jax.eval_shape(lambda p: forward(p, CONFIG, *ROWS), params)
    assert aux == AuxSums() and not jax.tree.leaves(aux)
    assert not jax.tree.leaves(AuxSums().sum_layers())


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_they_are_sums_over_layers(scan: bool, remat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient, by every path: scanned, unrolled, recomputed, with the layers' parameters apart."""
    monkeypatch.setattr(transformer, "Block", SquareBlock)
    config = dataclasses.replace(CONFIG, scan_layers=scan, remat=remat)
    params = make_params(CONFIG)

    def loss(params: object, apart: bool) -> tuple[jax.Array, AuxSums]:
        aux = forward(unstack_layers(params, config) if apart else params, config, *ROWS)[1]
        return aux.losses["square"][0], aux

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (total, aux), gradient = run(params, False)
    (expected, _), exact = run(params, True)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert total > 100 and float(aux.losses["square"][1]) == CONFIG.num_layers * 3 * 9
    np.testing.assert_array_equal(aux.loads["experts"], CONFIG.num_layers * np.arange(3))
    for found, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(found, wanted, atol=3e-5 * np.abs(wanted).max())


def test_log_probs_and_scores_pass_them_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer, "Block", SquareBlock)
    params = make_params(CONFIG)
    scorer = {"trunk": params, "head": {"w": jnp.ones((CONFIG.d_model, 1))}}
    expected = forward(params, CONFIG, *ROWS)[1]
    for found in (token_logps(params, CONFIG, *ROWS)[1], scorer_outputs(scorer, CONFIG, *ROWS)[1]):
        jax.tree.map(np.testing.assert_array_equal, found, expected)
