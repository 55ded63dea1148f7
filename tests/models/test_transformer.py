"""The decoder against NumPy, and what each position may and may not see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import ModelConfig
from models.layers import apply_rope, rope_tables
from models.transformer import forward, init_params, unembedding
from tests.models.reference import numpy_hidden, numpy_unembedding
from tests.models.tiny import CONFIG, UNTIED, left_padded, make_params, make_tokens, plain

MULTI_HEAD = dataclasses.replace(CONFIG, num_kv_heads=4, head_dim=6, d_ff=20, rope_theta=10_000.0)
MULTI_QUERY = dataclasses.replace(UNTIED, num_kv_heads=1, num_layers=1, norm_eps=1e-2)

run = jax.jit(forward, static_argnames="config")


@pytest.mark.parametrize("config", [CONFIG, UNTIED, MULTI_HEAD, MULTI_QUERY], ids=["gqa", "untied", "mha", "mqa"])
def test_matches_numpy(config: ModelConfig) -> None:
    params = make_params(config)
    tokens = make_tokens(config, rows=3, length=9)
    positions = np.array([range(9), [0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 0, 0, 1, 2, 3, 4, 5, 6]], np.int32)
    segments = np.array([[1] * 9, [1, 1, 1, 1, 2, 2, 2, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1]], np.int32)
    hidden = run(params, config, tokens, positions, segments)
    expected = numpy_hidden(params, config, tokens, positions, segments)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(hidden, expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(unembedding(params, config), numpy_unembedding(params, config).astype(np.float32))


def test_untied_read_out_is_a_parameter_of_its_own() -> None:
    assert "unembed" not in init_params(CONFIG, jax.random.key(0))
    params = make_params(UNTIED)
    assert not np.array_equal(unembedding(params, UNTIED), params["embed"].T)


def test_packed_documents_are_separate_rows() -> None:
    params, lengths = make_params(CONFIG), (4, 5, 3)
    documents = [make_tokens(CONFIG, 1, n, seed=n)[0] for n in lengths]
    packed = np.concatenate(documents)[None]
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None]
    segments = np.repeat(np.arange(1, 4, dtype=np.int32), lengths)[None]
    hidden = run(params, CONFIG, packed, positions, segments)
    start = 0
    for document, n in zip(documents, lengths, strict=True):
        alone = run(params, CONFIG, *plain(document[None]))
        np.testing.assert_allclose(hidden[:, start : start + n], alone, atol=1e-5)
        start += n

    changed = packed.copy()
    changed[:, :4] = (changed[:, :4] + 1) % CONFIG.vocab_size
    other = run(params, CONFIG, changed, positions, segments)
    assert np.abs(other - hidden)[:, :4].max() > 0.1
    np.testing.assert_array_equal(other[:, 4:], hidden[:, 4:])


def test_left_padding_changes_nothing() -> None:
    params = make_params(CONFIG)
    prompts = [make_tokens(CONFIG, 1, n, seed=n)[0] for n in (7, 3)]
    for width, fill in ((7, 0), (10, 0), (10, 5)):
        hidden = run(params, CONFIG, *left_padded(prompts, width, fill))
        for row, prompt in enumerate(prompts):
            alone = run(params, CONFIG, *plain(prompt[None]))[0]
            np.testing.assert_allclose(hidden[row, width - len(prompt) :], alone, atol=1e-5)
            assert np.isfinite(hidden).all()


def test_right_padding_changes_nothing() -> None:
    params, tokens = make_params(CONFIG), make_tokens(CONFIG, 2, 10)
    _, positions, ones = plain(tokens)
    padded = run(params, CONFIG, tokens, positions, np.where(np.arange(10)[None] < 7, ones, 0))
    np.testing.assert_allclose(padded[:, :7], run(params, CONFIG, *plain(tokens[:, :7])), atol=1e-5)


def test_future_tokens_do_not_matter() -> None:
    params, tokens = make_params(CONFIG), make_tokens(CONFIG, 1, 8)
    hidden = run(params, CONFIG, *plain(tokens))
    for t in (1, 4, 7):
        changed = tokens.copy()
        changed[:, t] = (changed[:, t] + 1) % CONFIG.vocab_size
        other = run(params, CONFIG, *plain(changed))
        np.testing.assert_array_equal(other[:, :t], hidden[:, :t])
        assert (np.abs(other - hidden).max(axis=-1)[0, t:] > 1e-3).all()


def test_bfloat16_compute_is_finite_and_close() -> None:
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    params, batch = make_params(CONFIG), plain(make_tokens(CONFIG, 3, 9))
    hidden = run(params, config, *batch)
    exact = run(params, CONFIG, *batch)
    assert hidden.dtype == jnp.bfloat16
    error = np.abs(np.asarray(hidden, np.float32) - exact)
    assert 1e-4 < error.max() < 0.15
    gradient = jax.grad(lambda p: jnp.sum(run(p, config, *batch).astype(jnp.float32) ** 2))(params)
    for leaf in jax.tree.leaves(gradient):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()


def test_bfloat16_parameters() -> None:
    config = dataclasses.replace(CONFIG, param_dtype="bfloat16", compute_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(make_params(config))} == {jnp.dtype("bfloat16")}
    assert np.isfinite(np.asarray(run(make_params(config), config, *plain(make_tokens(config, 1, 5))), np.float32)).all()


def test_norm_is_float32_in_bfloat16_compute() -> None:
    """Activations of 256 +- 1 differ by less than bfloat16 resolves after squaring."""
    from models.layers import RMSNorm

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
        turn = lambda x, p: apply_rope(x, *rope_tables(jnp.full((1, 1), p, jnp.int32), CONFIG))  # noqa: E731
        return float(jnp.sum(turn(q, at) * turn(k, at - back)))

    np.testing.assert_allclose([score(at, 3) for at in (3, 10, 57)], score(20, 3), atol=1e-4)
    assert abs(score(20, 3) - score(20, 4)) > 1e-2
    np.testing.assert_allclose(score(9, 0), float(jnp.sum(q * k)), atol=1e-5)


def test_positions_may_start_anywhere() -> None:
    params, (tokens, positions, segments) = make_params(CONFIG), plain(make_tokens(CONFIG, 2, 8))
    hidden = run(params, CONFIG, tokens, positions, segments)
    np.testing.assert_allclose(run(params, CONFIG, tokens, positions + 31, segments), hidden, atol=1e-4)
    assert np.abs(run(params, CONFIG, tokens, positions * 2, segments) - hidden).max() > 1e-2


def test_initial_scale() -> None:
    """Residual branches start small (1 / sqrt(2 L)) and the norms at one, so depth does not blow the stream up."""
    config = dataclasses.replace(CONFIG, d_model=128, num_layers=8, d_ff=256)
    params = init_params(config, jax.random.key(0))
    std = {jax.tree_util.keystr(k): float(np.std(v)) for k, v in jax.tree_util.tree_leaves_with_path(params)}
    expected = {"wq": 128**-0.5, "wo": 32**-0.5 / 4, "gate": 128**-0.5, "down": 256**-0.5 / 4, "embed": 0.02}
    for name, value in expected.items():
        found = next(v for k, v in std.items() if f"'{name}'" in k)
        assert found == pytest.approx(value, rel=0.05), name
    layers = params["layers"]["attention"]["wq"].value
    assert not np.array_equal(layers[0], layers[1])
