"""`scan_layers` and `remat` change how the same numbers are computed, and do change it."""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import Remat
from tests.models.tiny import CONFIG, hidden_states, make_params, make_tokens, plain

REMATS: tuple[Remat, ...] = ("none", "dots", "full")
BATCH = plain(make_tokens(CONFIG, 3, 9))


class Outcome(NamedTuple):
    value: float
    gradient: Any
    flops: float
    loops: int


def loss_under(scan: bool, remat: Remat) -> Callable[[Any], jax.Array]:
    """A loss whose gradient reaches every parameter."""
    config = dataclasses.replace(CONFIG, scan_layers=scan, remat=remat)
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((3, 9, CONFIG.d_model)), jnp.float32)
    return lambda params: jnp.sum(weights * hidden_states(params, config, *BATCH))


@cache
def outcome(scan: bool, remat: Remat) -> Outcome:
    params = make_params(CONFIG)
    compiled = jax.jit(jax.value_and_grad(loss_under(scan, remat))).lower(params).compile()
    value, gradient = compiled(params)
    return Outcome(float(value), gradient, compiled.cost_analysis()["flops"], compiled.as_text().count(" while("))


@cache
def residuals(scan: bool, remat: Remat) -> int:
    """Elements that the forward pass leaves for the backward pass, the parameters included."""
    _, pull_back = jax.eval_shape(lambda params: jax.vjp(loss_under(scan, remat), params), make_params(CONFIG))
    return sum(leaf.size for leaf in jax.tree.leaves(pull_back))


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_value_and_gradient_are_the_same(scan: bool, remat: Remat) -> None:
    plain_run, this = outcome(False, "none"), outcome(scan, remat)
    assert this.value == pytest.approx(plain_run.value, rel=1e-5)
    for (path, leaf), expected in zip(
        jax.tree_util.tree_leaves_with_path(this.gradient), jax.tree.leaves(plain_run.gradient), strict=True
    ):
        assert np.abs(expected).max() > 1e-2, path
        np.testing.assert_allclose(leaf, expected, atol=3e-5 * np.abs(expected).max(), err_msg=str(path))


def test_scan_and_unrolled_are_different_programs() -> None:
    """Forward and backward over layers are a loop each."""
    assert outcome(True, "none").loops == outcome(False, "none").loops + 2


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_remat_saves_less_and_recomputes_more(scan: bool) -> None:
    saved = {remat: residuals(scan, remat) for remat in REMATS}
    assert saved["full"] < 0.8 * saved["dots"]
    assert saved["dots"] < 0.7 * saved["none"]
    # The compiler did not undo it: XLA counts the recomputed products.
    flops = {remat: outcome(scan, remat).flops for remat in REMATS}
    assert flops["full"] > 1.15 * flops["dots"]
    assert flops["dots"] > 1.01 * flops["none"]


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_full_remat_saves_block_inputs_only(scan: bool) -> None:
    """No attention weights, no heads, no feed-forward activations: nothing with B x T but [L, B, T, D]."""
    params = make_params(CONFIG)

    def shapes(remat: Remat) -> set[tuple[int, ...]]:
        _, pull_back = jax.eval_shape(lambda p: jax.vjp(loss_under(scan, remat), p), params)
        known = {leaf.shape for leaf in jax.tree.leaves(params)} | {leaf.shape[1:] for leaf in jax.tree.leaves(params)}
        shapes = {leaf.shape for leaf in jax.tree.leaves(pull_back)} - known
        return {shape for shape in shapes if np.prod(shape) > CONFIG.num_layers * 3 * 9 * CONFIG.d_model}

    assert shapes("full") == set()
    assert shapes("none") != set()
