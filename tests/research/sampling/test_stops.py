"""Where a completion ends, and greedy decoding with and without the cache."""

from functools import cache

import jax
import numpy as np
import pytest

from models.decode.rows import resize
from models.logprobs import token_logps
from models.transformer import forward, unembedding
from research.sampling.sampler import decode, sample, start
from research.sampling.types import STOPPED, TRUNCATED, Completions
from tests.models.tiny import CONFIG, ONE_LAYER, make_params, make_tokens, right_padded
from tests.research.sampling.tiny import GREEDY, make_prompts, make_spec, scalars

STOPS = tuple(range(0, 40, 5))
N, WIDTH = 12, 8
# The pad token is a stop token, and it also occurs in the prompts.
SPEC = make_spec(N, 2, stops=STOPS, pad=STOPS[1])
PROMPTS = make_prompts([make_tokens(CONFIG, 1, n, seed=n)[0] for n in (8, 5, 3)], WIDTH)


@cache
def drawn(seed: int) -> Completions:
    return jax.device_get(sample(make_params(ONE_LAYER), PROMPTS, scalars(seed), config=ONE_LAYER, spec=SPEC))


@cache
def drawn_without_stops(seed: int) -> Completions:
    spec = make_spec(N, 2, pad=STOPS[1])
    return jax.device_get(sample(make_params(ONE_LAYER), PROMPTS, scalars(seed), config=ONE_LAYER, spec=spec))


@pytest.mark.parametrize("seed", range(6))
def test_ends_with_the_first_stop_token(seed: int) -> None:
    """Against the same draws without stop tokens, read by a loop."""
    out, free = drawn(seed), drawn_without_stops(seed)
    for row, tokens in enumerate(free.tokens):
        ends = [t for t, token in enumerate(tokens) if token in STOPS]
        length = ends[0] + 1 if ends else N
        assert out.lengths[row] == length
        assert out.stop_reason[row] == (STOPPED if ends else TRUNCATED)
        np.testing.assert_array_equal(out.mask[row], np.arange(N) < length)
        np.testing.assert_array_equal(out.tokens[row, :length], tokens[:length])
        np.testing.assert_array_equal(out.tokens[row, length:], SPEC.pad_id)
        for name in ("sampler_logps", "policy_logps"):
            found, expected = getattr(out, name)[row], getattr(free, name)[row]
            np.testing.assert_allclose(found[:length], expected[:length], atol=1e-5)
            np.testing.assert_array_equal(found[length:], 0.0)


def test_the_seeds_cover_every_ending() -> None:
    rows = [
        (int(length), int(reason), int(tokens[length - 1]))
        for seed in range(6)
        for length, reason, tokens in zip(drawn(seed).lengths, drawn(seed).stop_reason, drawn(seed).tokens, strict=True)
    ]
    assert {reason for _, reason, _ in rows} == {STOPPED, TRUNCATED}
    assert any(last == SPEC.pad_id for _, reason, last in rows if reason == STOPPED), "pad_id as the real end"
    assert {1, 2} <= {length for length, *_ in rows}
    assert len({length for length, *_ in rows}) > 4


def test_no_stop_tokens_means_truncated() -> None:
    out = drawn_without_stops(0)
    assert out.mask.all() and (out.lengths == N).all() and (out.stop_reason == TRUNCATED).all()


def test_loop_ends_when_every_row_has() -> None:
    params = make_params(ONE_LAYER)
    run = jax.jit(decode, static_argnames=("steps", "config", "spec"))
    early = next(seed for seed in range(200) if drawn(seed).lengths.max() < N - 1)
    for seed in (early, next(seed for seed in range(6) if drawn(seed).lengths.max() == N)):
        slots = start(params, PROMPTS, scalars(seed), config=ONE_LAYER, spec=SPEC)
        slots = slots.replace(cache=resize(slots.cache, WIDTH + N))
        never, steps = np.int32(99), np.int32(N)
        slots, chunk = run(params, slots, scalars(seed), never, steps, steps=N, config=ONE_LAYER, spec=SPEC)
        assert int(chunk.active.any(axis=1).sum()) == drawn(seed).lengths.max()
        assert int(slots.cache.length) == WIDTH - 1 + drawn(seed).lengths.max()


def test_one_new_token() -> None:
    """One decode step: that of the prompt's last token."""
    spec = make_spec(1, 2, stops=STOPS, pad=STOPS[1])
    out = sample(make_params(ONE_LAYER), PROMPTS, scalars(0), config=ONE_LAYER, spec=spec)
    np.testing.assert_array_equal(out.tokens[:, 0], drawn(0).tokens[:, 0])
    np.testing.assert_array_equal(out.stop_reason == STOPPED, drawn(0).lengths == 1)
    assert out.mask.all()


def test_greedy_equals_greedy_without_a_cache() -> None:
    params = make_params(CONFIG)
    out = sample(params, PROMPTS, scalars(), config=CONFIG, spec=make_spec(N, method=GREEDY))
    run = jax.jit(forward, static_argnames="config")
    texts = [PROMPTS.tokens[row, PROMPTS.mask[row]].tolist() for row in range(3)]
    sizes = [len(text) for text in texts]
    for _ in range(N):
        hidden, _ = run(params, CONFIG, *right_padded([np.array(text) for text in texts], WIDTH + N))
        for row, text in enumerate(texts):
            text.append(int(np.argmax(hidden[row, len(text) - 1] @ unembedding(params))))
    for row, text in enumerate(texts):
        assert out.tokens[row].tolist() == text[sizes[row] :]
    assert len({tuple(tokens) for tokens in out.tokens.tolist()}) == 3
    np.testing.assert_array_equal(out.sampler_logps, 0.0)
    batch = right_padded([np.array(text) for text in texts], WIDTH + N)
    logps = jax.jit(token_logps, static_argnames="config")(params, CONFIG, *batch)[0].logps
    for row, size in enumerate(sizes):
        np.testing.assert_allclose(out.policy_logps[row], logps[row, size : size + N], atol=1e-4)
