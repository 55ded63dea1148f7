"""Prefill and decode through the KV cache against the whole sequence at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.cache import init_cache
from models.config import ModelConfig
from models.transformer import forward, forward_cached, unstack_layers
from tests.models.tiny import CONFIG, left_padded, make_params, make_tokens

run = jax.jit(forward, static_argnames="config")
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


def test_float32_cache_dtype_and_layout() -> None:
    cache = init_cache(CONFIG, 3, 11)
    assert len(cache.layers) == CONFIG.num_layers
    assert {leaf.shape for leaf in jax.tree.leaves(cache.layers)} == {(3, 2, 11, 8)}
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers)} == {jnp.dtype("float32")}


def test_mask_counts_from_the_write_position() -> None:
    cache = init_cache(CONFIG, 1, 5).replace(segment_ids=jnp.array([[0, 1, 1, 1, 0]]), length=jnp.int32(2))
    found = cache.mask(2, jnp.array([[1, 1]]))[0].astype(int)
    np.testing.assert_array_equal(found, [[0, 1, 1, 0, 0], [0, 1, 1, 1, 0]])
