"""Scorers: how heads start, which token a score speaks of, and that padding and meshes change nothing."""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from models.axes import MESH_AXES, batch_sharding, param_shardings
from models.heads import (
    STEP_HEAD_STD,
    VALUE_HEAD_STD,
    ScoreHead,
    init_head,
    init_scorer,
    last_token_scores,
    reward_head_std,
    scorer_outputs,
    state_values,
)
from tests.models.reference import numpy_hidden
from tests.models.tiny import CONFIG, ONE_LAYER, UNTIED, left_padded, make_params, make_tokens, plain, right_padded


def outputs_of(scorer: Any, config: Any, *rows: jax.Array) -> jax.Array:
    return scorer_outputs(scorer, config, *rows)[0]


run = jax.jit(outputs_of, static_argnames="config")


def make_scorer(config: Any, outputs: int, seed: int = 0) -> dict[str, Any]:
    w = np.random.default_rng(seed).standard_normal((config.d_model, outputs)) / config.d_model**0.5
    return {"trunk": make_params(config), "head": {"w": jnp.asarray(w, config.param_dtype)}}


@pytest.mark.parametrize("outputs", [1, 2, 5])
def test_outputs_are_the_final_hidden_states_times_the_head(outputs: int) -> None:
    scorer, tokens = make_scorer(CONFIG, outputs), make_tokens(CONFIG, rows=3, length=9)
    positions = np.array([range(9), [0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 0, 0, 1, 2, 3, 4, 5, 6]], np.int32)
    segments = np.array([[1] * 9, [1, 1, 1, 1, 2, 2, 2, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1]], np.int32)
    hidden = numpy_hidden(scorer["trunk"], CONFIG, tokens, positions, segments)
    expected = np.zeros((3, 9, outputs))
    for b in range(3):
        for t in range(9):
            for o in range(outputs):
                expected[b, t, o] = sum(hidden[b, t] * np.asarray(scorer["head"]["w"], np.float64)[:, o])
    found = run(scorer, CONFIG, tokens, positions, segments)
    assert found.shape == (3, 9, outputs) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


def test_heads_start_at_their_scale() -> None:
    config = dataclasses.replace(CONFIG, d_model=4095)
    assert reward_head_std(config) == 1 / 64
    assert STEP_HEAD_STD == 0.02
    for std in (reward_head_std(config), STEP_HEAD_STD):
        w = init_head(config, jax.random.key(0), outputs=2, head_std=std)["w"].value
        assert w.shape == (4095, 2)
        assert float(jnp.std(w)) == pytest.approx(std, rel=0.05)
        assert abs(float(jnp.mean(w))) < 4 * std / 8190**0.5
    zero = init_head(config, jax.random.key(0), outputs=1, head_std=VALUE_HEAD_STD)["w"].value
    assert not np.any(zero)
    keys = [init_head(CONFIG, jax.random.key(k), outputs=1, head_std=1.0)["w"].value for k in (0, 1)]
    assert not np.array_equal(*keys)


def test_a_scorer_is_a_trunk_and_a_head_with_named_axes() -> None:
    boxed = jax.eval_shape(partial(init_scorer, UNTIED, outputs=2, head_std=0.02), jax.random.key(0))
    assert set(boxed) == {"trunk", "head"}
    trunk = jax.tree.structure(make_params(UNTIED))
    assert jax.tree.structure(nn.meta.unbox(boxed["trunk"])) == trunk
    assert tuple(nn.get_partition_spec(boxed)["head"]["w"]) == ("embed", None)
    low = dataclasses.replace(CONFIG, param_dtype="bfloat16")
    assert init_head(low, jax.random.key(0), outputs=1, head_std=0.1)["w"].value.dtype == jnp.bfloat16


def test_an_output_knows_its_token_and_none_after_it() -> None:
    scorer, tokens = make_scorer(CONFIG, 1), np.tile(make_tokens(CONFIG, 1, 9), (2, 1))
    tokens[1, 4] = (tokens[1, 4] + 1) % CONFIG.vocab_size
    out = np.asarray(run(scorer, CONFIG, *plain(tokens))[:, :, 0])
    np.testing.assert_array_equal(np.abs(out[1] - out[0]) > 1e-6, np.arange(9) >= 4)
    values = np.asarray(state_values(out))
    # The value at 4 is of the state before token 4 was drawn.
    np.testing.assert_array_equal(np.abs(values[1] - values[0]) > 1e-6, np.arange(9) >= 5)
    assert not values[:, 0].any()
    for t in range(1, 9):
        np.testing.assert_array_equal(values[:, t], out[:, t - 1])


@pytest.mark.parametrize("seed", range(52))
def test_the_last_real_token_is_read_wherever_padding_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    B, T = (4, 6) if seed % 2 else (3, 1)
    outputs = rng.standard_normal((B, T)).astype(np.float32)
    mask = np.zeros((B, T), bool)
    expected = np.zeros(B)
    for b in range(B):
        size = int(rng.integers(0 if b else 1, T + 1))
        start = int(rng.choice([0, T - size, rng.integers(T - size + 1)]))  # right, left, both sides
        mask[b, start : start + size] = True
        for t in range(T):
            if mask[b, t]:
                expected[b] = outputs[b, t]
    outputs[~mask] = rng.choice([np.nan, np.inf, 1e30], size=int((~mask).sum()))
    found, gradient = jax.value_and_grad(lambda x: jnp.sum(last_token_scores(x, mask)))(outputs)
    np.testing.assert_array_equal(last_token_scores(outputs, mask), expected.astype(np.float32))
    assert found == pytest.approx(expected.sum(), abs=1e-5)
    hits = np.zeros((B, T))
    for b in range(B):
        if mask[b].any():
            hits[b, np.flatnonzero(mask[b])[-1]] = 1
    np.testing.assert_array_equal(gradient, hits)
    np.testing.assert_array_equal(last_token_scores(outputs, mask.astype(np.int32)), expected.astype(np.float32))


def test_fractional_masks_are_refused() -> None:
    with pytest.raises(TypeError, match="mask: got dtype float32, expected bool"):
        last_token_scores(jnp.zeros((2, 3)), jnp.ones((2, 3)))


def test_left_padding_right_padding_and_no_padding_score_alike() -> None:
    scorer = make_scorer(CONFIG, 1)
    prompts = [make_tokens(CONFIG, 1, n, seed=n)[0] for n in (9, 6, 1)]

    def scores(tokens: np.ndarray, positions: np.ndarray, segments: np.ndarray) -> jax.Array:
        return last_token_scores(run(scorer, CONFIG, tokens, positions, segments)[:, :, 0], segments > 0)

    alone = np.concatenate([scores(*plain(prompt[None])) for prompt in prompts])
    assert len(set(np.round(alone, 3).tolist())) == 3
    for fill in (0, 7):
        np.testing.assert_allclose(scores(*left_padded(prompts, 12, fill)), alone, atol=1e-5)
    np.testing.assert_allclose(scores(*right_padded(prompts, 12)), alone, atol=1e-5)


def test_bfloat16_compute_gives_float32_outputs_and_gradients() -> None:
    config = dataclasses.replace(ONE_LAYER, compute_dtype="bfloat16")
    scorer, batch = make_scorer(ONE_LAYER, 2), plain(make_tokens(config, 3, 9))
    out, exact = run(scorer, config, *batch), run(scorer, ONE_LAYER, *batch)
    assert out.dtype == jnp.float32
    error = np.abs(np.asarray(out) - exact)
    assert 1e-4 < error.max() < 0.3 and error.mean() < 0.03
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(outputs_of(p, config, *batch) ** 2)))(scorer)
    assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    # The head itself does not round: bfloat16 hidden states are summed in float32.
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 32)), jnp.bfloat16)
    expected = np.asarray(hidden, np.float64) @ np.asarray(scorer["head"]["w"], np.float64)
    found = ScoreHead(2, 0.0, "float32").apply({"params": scorer["head"]}, hidden)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_one_device_equals_eight() -> None:
    mesh = jax.make_mesh((2, 2, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    boxed = jax.eval_shape(partial(init_scorer, ONE_LAYER, outputs=2, head_std=0.02), jax.random.key(0))
    scorer, batch = make_scorer(ONE_LAYER, 2), plain(make_tokens(ONE_LAYER, 8, 10))
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((8, 10, 2)), jnp.float32)

    def loss(params: Any, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> tuple:
        out = outputs_of(params, ONE_LAYER, tokens, positions, segments)
        last = last_token_scores(out[:, :, 0], segments > 0)
        return jnp.sum(weights * out) + jnp.sum(last**2), (out, last)

    step = lambda: jax.jit(jax.value_and_grad(loss, has_aux=True))  # noqa: E731
    (_, one), gradient = step()(scorer, *batch)
    placed = jax.device_put(scorer, param_shardings(boxed, mesh))
    assert placed["head"]["w"].addressable_shards[0].data.shape == (16, 2)
    with jax.set_mesh(mesh):
        (_, eight), gradient_8 = step()(placed, *jax.device_put(batch, batch_sharding(mesh)))
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_8), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5 * np.abs(a).max())
