"""The decoder against NumPy, and what each position may and may not see."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import ModelConfig
from models.layers import RMSNorm, apply_rope, rope_tables
from models.transformer import init_params, unembedding, unstack_layers
from tests.models.reference import numpy_hidden, numpy_unembedding
from tests.models.tiny import (
    CONFIG,
    ONE_LAYER,
    UNTIED,
    hidden_states,
    left_padded,
    make_params,
    make_tokens,
    plain,
    right_padded,
)

MULTI_HEAD = dataclasses.replace(CONFIG, num_kv_heads=4, head_dim=6, d_ff=20, rope_theta=10_000.0)
MULTI_QUERY = dataclasses.replace(UNTIED, num_kv_heads=1, num_layers=1, norm_eps=1e-2)

run = jax.jit(hidden_states, static_argnames="config")


@pytest.mark.parametrize("config", [CONFIG, MULTI_HEAD, MULTI_QUERY], ids=["gqa", "mha", "mqa_untied"])
def test_matches_numpy(config: ModelConfig) -> None:
    params = make_params(config)
    tokens = make_tokens(config, rows=3, length=9)
    positions = np.array([range(9), [0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 0, 0, 1, 2, 3, 4, 5, 6]], np.int32)
    segments = np.array([[1] * 9, [1, 1, 1, 1, 2, 2, 2, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1]], np.int32)
    hidden = run(params, config, tokens, positions, segments)
    expected = numpy_hidden(params, config, tokens, positions, segments)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(hidden, expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(unembedding(params), numpy_unembedding(params, config).astype(np.float32))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_parameters_have_the_names_and_shapes_of_stored_checkpoints(scan: bool) -> None:
    """A change here makes every checkpoint unreadable."""
    V, L, D, H, K, N, F = 40, 2, 32, 4, 2, 8, 48
    layer = {
        "attention": {"wq": (D, H, N), "wk": (D, K, N), "wv": (D, K, N), "wo": (H, N, D)},
        "attention_norm": {"scale": (D,)},
        "mlp": {"gate": (D, F), "up": (D, F), "down": (F, D)},
        "mlp_norm": {"scale": (D,)},
    }
    shape = lambda x: isinstance(x, tuple) and isinstance(x[0], int)  # noqa: E731
    stacked = jax.tree.map(lambda x: (L, *x), layer, is_leaf=shape)
    outside = {"embed": (V, D), "unembed": (D, V), "final_norm": {"scale": (D,)}}
    config = dataclasses.replace(UNTIED, scan_layers=scan)
    params = jax.eval_shape(lambda key: nn.meta.unbox(init_params(config, key)), jax.random.key(0))
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)  # noqa: E731
    assert shapes(params) == {**outside, "layers": stacked}
    apart = jax.eval_shape(lambda p: unstack_layers(p, config), params)
    assert shapes(apart) == {**outside, "layers": (layer,) * L}


def test_untied_read_out_is_a_parameter_of_its_own() -> None:
    assert "unembed" not in make_params(CONFIG)
    params = make_params(UNTIED)
    assert not np.array_equal(unembedding(params), params["embed"].T)


def test_packed_documents_are_separate_rows() -> None:
    params, lengths = make_params(CONFIG), (4, 3, 2)
    documents = [make_tokens(CONFIG, 1, n, seed=n)[0] for n in lengths]
    packed = np.tile(np.concatenate(documents), (3, 1))
    positions = np.tile(np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]), (3, 1))
    segments = np.tile(np.repeat(np.arange(1, 4, dtype=np.int32), lengths), (3, 1))
    packed[1, :4] = (packed[1, :4] + 1) % CONFIG.vocab_size
    packed[2, 4:7] = (packed[2, 4:7] + 1) % CONFIG.vocab_size
    hidden = run(params, CONFIG, packed, positions, segments)
    alone = run(params, CONFIG, *right_padded(documents, 9))
    for document, start in enumerate((0, 4, 7)):
        n = lengths[document]
        np.testing.assert_allclose(hidden[0, start : start + n], alone[document, :n], atol=1e-5)
    differs = np.abs(hidden - hidden[:1]).max(axis=-1) > 1e-6
    np.testing.assert_array_equal(differs[1], segments[0] == 1)
    np.testing.assert_array_equal(differs[2], segments[0] == 2)


def test_left_padding_changes_nothing() -> None:
    params = make_params(CONFIG)
    prompts = [make_tokens(CONFIG, 1, n, seed=n)[0] for n in (9, 6, 2)]
    alone = run(params, CONFIG, *right_padded(prompts, 9))
    for width, fill in ((9, 0), (9, 5), (12, 0)):
        hidden = run(params, CONFIG, *left_padded(prompts, width, fill))
        assert np.isfinite(hidden).all()
        for row, prompt in enumerate(prompts):
            n = len(prompt)
            np.testing.assert_allclose(hidden[row, width - n :], alone[row, :n], atol=1e-5)


def test_future_tokens_do_not_matter() -> None:
    params, tokens = make_params(CONFIG), np.tile(make_tokens(CONFIG, 1, 9), (3, 1))
    tokens[1, 4] = (tokens[1, 4] + 1) % CONFIG.vocab_size
    tokens[2, 8] = (tokens[2, 8] + 1) % CONFIG.vocab_size
    hidden = run(params, CONFIG, *plain(tokens))
    differs = np.abs(hidden - hidden[:1]).max(axis=-1) > 1e-6
    np.testing.assert_array_equal(differs[1], np.arange(9) >= 4)
    np.testing.assert_array_equal(differs[2], np.arange(9) >= 8)


def test_bfloat16_compute_is_finite_and_close() -> None:
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    params, batch = make_params(CONFIG), plain(make_tokens(CONFIG, 3, 9))
    hidden = run(params, config, *batch)
    exact = run(params, CONFIG, *batch)
    assert hidden.dtype == jnp.bfloat16
    error = np.abs(np.asarray(hidden, np.float32) - exact)
    assert error.max() > 1e-4  # it did run in bfloat16
    assert error.mean() < 0.03 and error.max() < 0.3  # hidden states are about 1, bfloat16 resolves 1 / 256
    one = dataclasses.replace(ONE_LAYER, compute_dtype="bfloat16")
    loss = lambda p: jnp.sum(hidden_states(p, one, *batch).astype(jnp.float32) ** 2)  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(make_params(ONE_LAYER))
    for leaf in jax.tree.leaves(gradient):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()


def test_bfloat16_parameters() -> None:
    config = dataclasses.replace(CONFIG, param_dtype="bfloat16", compute_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(make_params(config))} == {jnp.dtype("bfloat16")}
    assert np.isfinite(
        np.asarray(run(make_params(config), config, *plain(make_tokens(config, 3, 9))), np.float32)
    ).all()


def test_norm_is_float32_in_bfloat16_compute() -> None:
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 32)) * 300, jnp.bfloat16)
    y = RMSNorm(config).apply({"params": {"scale": jnp.ones(32)}}, x)
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean() + config.norm_eps)
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def test_rope_depends_on_relative_position_only() -> None:
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(at: int, back: int) -> float:
        turn = lambda x, p: apply_rope(x, *rope_tables(jnp.full((1, 1), p, jnp.int32), CONFIG.rope_theta, 8))  # noqa: E731
        return float(jnp.sum(turn(q, at) * turn(k, at - back)))

    np.testing.assert_allclose([score(at, 3) for at in (3, 10, 57)], score(20, 3), atol=1e-4)
    assert abs(score(20, 3) - score(20, 4)) > 1e-2
    np.testing.assert_allclose(score(9, 0), float(jnp.sum(q * k)), atol=1e-5)


def test_positions_may_start_anywhere() -> None:
    params, (tokens, positions, segments) = make_params(CONFIG), plain(make_tokens(CONFIG, 3, 9))
    hidden = run(params, CONFIG, tokens, positions, segments)
    np.testing.assert_allclose(run(params, CONFIG, tokens, positions + 31, segments), hidden, atol=1e-4)
    assert np.abs(run(params, CONFIG, tokens, positions * 2, segments) - hidden).max() > 1e-2


def test_initial_scale() -> None:
    """Residual branches start small (1 / sqrt(2 L)) and the norms at one, so depth does not blow the stream up."""
    config = dataclasses.replace(CONFIG, d_model=128, num_layers=8, d_ff=256, tie_embeddings=False)
    key = jax.random.key(0, impl="rbg")  # compiles faster than threefry
    params = jax.jit(init_params, static_argnums=0)(config, key)
    std = {jax.tree_util.keystr(k): float(np.std(v)) for k, v in jax.tree_util.tree_leaves_with_path(params)}
    expected = {"wq": 128**-0.5, "wo": 32**-0.5 / 4, "gate": 128**-0.5, "down": 256**-0.5 / 4, "embed": 0.02}
    expected["unembed"] = 128**-0.5
    for name, value in expected.items():
        found = next(v for k, v in std.items() if f"'{name}'" in k)
        assert found == pytest.approx(value, rel=0.05), name
    layers = params["layers"]["attention"]["wq"].value
    assert not np.array_equal(layers[0], layers[1])
