"""Prefill and decode through the KV cache against the whole sequence at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import ModelConfig
from models.decode.attention import cached_attention
from models.decode.cache import LayerCache, Reach, init_cache, quantize
from models.decode.rows import take_rows, with_prefix
from models.transformer import forward_cached, unstack_layers
from tests.models.tiny import CONFIG, hidden_states, left_padded, make_params, make_tokens

run = jax.jit(hidden_states, static_argnames="config")
step = jax.jit(forward_cached, static_argnames="config")

PROMPTS = [make_tokens(CONFIG, 1, n, seed=n)[0] for n in (9, 6, 2)]


def prefill_then_decode(
    config: ModelConfig, prompt_slots: int, *, slots: int, unstacked: bool = False
) -> tuple[np.ndarray, object]:
    """Hidden states of left-padded rows of 9 slots, `prompt_slots` of them at once, the others one by one."""
    params = make_params(CONFIG)
    tokens, positions, segments = left_padded(PROMPTS, 9)
    params = unstack_layers(params, config) if unstacked else params
    cache = init_cache(config, len(PROMPTS), slots)
    hidden = []
    for start, stop in [(0, prompt_slots), *((t, t + 1) for t in range(prompt_slots, 9))]:
        part = (x[:, start:stop] for x in (tokens, positions, segments))
        states, cache = step(params, config, *part, cache)
        hidden.append(states)
    return np.concatenate(hidden, axis=1), cache


@pytest.mark.parametrize("prompt_slots,slots,unstacked", [(9, 12, False), (7, 9, True)])
def test_cached_equals_uncached(prompt_slots: int, slots: int, unstacked: bool) -> None:
    tokens, positions, segments = left_padded(PROMPTS, 9)
    expected = run(make_params(CONFIG), CONFIG, tokens, positions, segments)
    hidden, cache = prefill_then_decode(CONFIG, prompt_slots, slots=slots, unstacked=unstacked)
    real = segments.astype(bool)
    np.testing.assert_allclose(hidden[real], np.asarray(expected)[real], atol=1e-5)
    assert int(cache.length) == 9
    np.testing.assert_array_equal(cache.segment_ids[:, :9], segments)
    assert not np.any(cache.segment_ids[:, 9:])
    for layer in cache.layers:
        assert not np.any(layer.keys[:, :, 9:]) and np.all(np.any(layer.keys[:, :, :9], axis=-1))


def test_bfloat16_cache() -> None:
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    cache = init_cache(config, 3, 9)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers)} == {jnp.dtype("bfloat16")}
    hidden, cache = prefill_then_decode(config, 7, slots=9)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers)} == {jnp.dtype("bfloat16")}
    tokens, positions, segments = left_padded(PROMPTS, 9)
    expected = np.asarray(run(make_params(CONFIG), config, tokens, positions, segments), np.float32)
    real = segments.astype(bool)
    error = np.abs(hidden.astype(np.float32) - expected)[real]
    assert np.isfinite(error).all() and error.mean() < 0.02 and error.max() < 0.3


def test_int8_keys_and_values_are_within_half_a_step() -> None:
    x = np.random.default_rng(0).normal(size=(2, 2, 5, 8)).astype(np.float32)
    x[0, 1, 3] = 0.0
    steps, scales = quantize(x)
    np.testing.assert_allclose(scales, np.abs(x).max(axis=-1) / 127, rtol=1e-6)
    assert steps.dtype == jnp.int8 and np.abs(steps).max(axis=-1)[scales > 0].min() == 127
    assert not np.any(steps[0, 1, 3]), "a vector of zeros stays one"
    assert np.all(np.abs(steps * scales[..., None] - x) <= scales[..., None] * 0.5 + 1e-7)


def test_attention_to_an_int8_cache_is_that_to_its_values() -> None:
    rng = np.random.default_rng(1)
    keys, values = (rng.normal(size=(2, 2, 6, 8)).astype(np.float32) for _ in range(2))
    (k, k_scales), (v, v_scales) = quantize(keys), quantize(values)
    reach = Reach(jnp.int32(0), jnp.asarray(rng.random((2, 3, 6)) < 0.8), None)
    q_BTHN = jnp.asarray(rng.normal(size=(2, 3, 4, 8)), jnp.float32)
    plain = LayerCache(k * k_scales[..., None], v * v_scales[..., None])
    found = cached_attention(q_BTHN, LayerCache(k, v, k_scales, v_scales), reach)
    np.testing.assert_allclose(found, cached_attention(q_BTHN, plain, reach), atol=1e-5)


def test_float32_cache_dtype_and_layout() -> None:
    cache = init_cache(CONFIG, 3, 11)
    assert len(cache.layers) == CONFIG.num_layers
    assert {leaf.shape for leaf in jax.tree.leaves(cache.layers)} == {(3, 2, 11, 8)}
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers)} == {jnp.dtype("float32")}


def test_mask_counts_from_the_write_position() -> None:
    cache = init_cache(CONFIG, 1, 5).replace(segment_ids=jnp.array([[0, 1, 0, 0, 0]]), length=jnp.int32(2))
    longer, reach = cache.append(jnp.array([[1, 1]]))
    np.testing.assert_array_equal(reach.mask_BTS[0].astype(int), [[0, 1, 1, 0, 0], [0, 1, 1, 1, 0]])
    assert (int(reach.write_at), int(longer.length)) == (2, 4)


@pytest.mark.parametrize("int8", [False, True])
def test_one_row_without_its_batch_axis(int8: bool) -> None:
    """The axis comes and goes, and tokens read and write the same."""
    params, (tokens, positions, segments) = make_params(CONFIG), left_padded(PROMPTS[:1], 9)
    cache = init_cache(CONFIG, 1, 11, int8=int8)
    first = step(params, CONFIG, tokens[:, :6], positions[:, :6], segments[:, :6], cache)[1]
    parts = tuple(x[:, 6:8] for x in (tokens, positions, segments))
    expected, plain = step(params, CONFIG, *parts, first)
    squeezed = first.squeezed()
    assert {leaf.shape[0] for leaf in jax.tree.leaves(squeezed.layers)} == {CONFIG.num_kv_heads}
    found, squeezed = step(params, CONFIG, *parts, squeezed)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    for one, two in zip(jax.tree.leaves(squeezed.unsqueezed()), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


def test_more_rows_keep_their_batch_axis() -> None:
    cache = init_cache(CONFIG, 2, 5)
    assert cache.squeezed() is cache and cache.unsqueezed() is cache


def test_a_prefix_of_each_group_is_as_if_every_row_held_it() -> None:
    """Two prompts of different lengths, three rows each, three tokens a row at once."""
    params, (tokens, positions, segments) = make_params(CONFIG), left_padded(PROMPTS[:2], 9)
    prompts = step(params, CONFIG, tokens, positions, segments, init_cache(CONFIG, 2, 9))[1]
    rest = make_tokens(CONFIG, 6, 3, seed=7)
    places = np.repeat(positions[:, -1:] + 1, 3, axis=0) + np.arange(3)
    ones = np.ones((6, 3), np.int32)

    held = take_rows(prompts, np.repeat([0, 1], 3))
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 3), (0, 0)))  # noqa: E731
    held = held.replace(
        layers=tuple(layer.map_slots(pad) for layer in held.layers),
        segment_ids=jnp.pad(held.segment_ids, ((0, 0), (0, 3))),
    )
    expected, _ = step(params, CONFIG, rest, places, ones, held)
    shared = with_prefix(init_cache(CONFIG, 6, 3), prompts)
    found, written = step(params, CONFIG, rest, places, ones, shared)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert written.layers[0].keys.shape[2] == 3 and int(written.length) == 3
