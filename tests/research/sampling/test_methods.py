"""The distribution that each method draws from, against NumPy, and the draw."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from research.sampling.methods import (
    SampledTokens,
    SamplingMethod,
    draw,
    draw_size,
    gumbel_noise,
    nucleus_mask,
    row_keys,
    sample_token,
)
from tests.research.sampling.reference import numpy_distribution, sampling_logps
from tests.research.sampling.tiny import GREEDY, TEMPERATURE, TOP_K, TOP_K_TOP_P, TOP_P

V = 7
LOGITS = np.random.default_rng(0).standard_normal((5, V)).astype(np.float32) * 2
distribution = jax.jit(sampling_logps, static_argnames="method")
sample = jax.jit(sample_token, static_argnames="method")


def probs_of(logits: np.ndarray, method: SamplingMethod, temperature: float = 1.0, top_p: float = 1.0) -> np.ndarray:
    logps = distribution(jnp.asarray(logits), method, jnp.float32(temperature), jnp.float32(top_p))
    return np.exp(np.asarray(logps, np.float64))


def kept(probs: list[float], top_p: float) -> list[int]:
    mask = jax.jit(nucleus_mask)(jnp.log(jnp.asarray([probs], jnp.float32)), jnp.float32(top_p))
    return np.flatnonzero(mask[0]).tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
@pytest.mark.parametrize("top_p", [0.2, 0.6, 0.95, 1.0])
@pytest.mark.parametrize(
    "method", [TEMPERATURE, GREEDY, TOP_K, TOP_P, TOP_K_TOP_P], ids=["plain", "greedy", "top_k", "top_p", "both"]
)
def test_equals_numpy(method: SamplingMethod, temperature: float, top_p: float) -> None:
    found = probs_of(LOGITS, method, temperature, top_p)
    expected = np.stack([numpy_distribution(row, method, temperature, top_p) for row in LOGITS])
    np.testing.assert_array_equal(found == 0, expected == 0)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=-1), 1.0, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, V - 1, V, V + 5])
def test_top_k_keeps_k(k: int) -> None:
    found = probs_of(LOGITS, SamplingMethod(top_k=k))
    np.testing.assert_array_equal((found > 0).sum(axis=-1), min(k, V))


def test_top_k_keeps_the_first_of_equal_tokens() -> None:
    found = probs_of(np.array([[0.0, 1.0, 1.0, 2.0]], np.float32), SamplingMethod(top_k=2))
    np.testing.assert_array_equal(found[0] > 0, [False, True, False, True])


@pytest.mark.parametrize("seed", range(4))
def test_top_p_keeps_the_smallest_set(seed: int) -> None:
    """Its mass reaches top_p, and without its least likely token it would not."""
    probs = np.random.default_rng(seed).dirichlet(np.ones(V))
    for top_p in (0.1, 0.5, 0.9, 0.99):
        chosen = kept(probs.tolist(), top_p)
        assert probs[chosen].sum() >= top_p
        assert probs[chosen].sum() - probs[chosen].min() < top_p
        assert probs[chosen].min() >= max((p for i, p in enumerate(probs) if i not in chosen), default=0.0)


def test_top_p_edges() -> None:
    assert kept([0.25, 0.5, 0.25], 0.5) == [1], "a mass of exactly top_p is enough"
    assert kept([0.25, 0.5, 0.25], 0.51) == [0, 1], "of two equal tokens one is enough: the first"
    assert kept([0.25, 0.25, 0.25, 0.25], 0.5) == [0, 1]
    assert kept([0.25, 0.25, 0.25, 0.25], 1e-6) == [0]
    assert kept([0.1, 0.1, 0.1, 0.7], 0.85) == [0, 1, 3]
    assert kept([0.1, 0.7, 0.1, 0.1], 0.0) == [1], "one token always stays"
    assert kept([1 - 2e-9, 1e-9, 1e-9], 1.0) == [0, 1, 2], "1 keeps all, whatever the rounding"
    assert kept([1.0, 0.0, 0.0], 0.9) == [0]


def test_top_p_counts_what_top_k_left() -> None:
    """Top-2 of (.4, .3, .2, .1) leaves (4/7, 3/7): 0.5 is reached by one token, where of all it takes two."""
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
    both = probs_of(logits, SamplingMethod(top_k=2, nucleus=True), top_p=0.5)
    np.testing.assert_array_equal(both[0] > 0, [True, False, False, False])
    alone = probs_of(logits, TOP_P, top_p=0.5)
    np.testing.assert_array_equal(alone[0] > 0, [True, True, False, False])


def test_top_p_of_nothing_leaves_the_best_of_the_top_k() -> None:
    found = probs_of(np.array([[0.0, 1.0, 3.0, 2.0]], np.float32), SamplingMethod(top_k=2, nucleus=True), top_p=0.0)
    np.testing.assert_array_equal(found[0] > 0, [False, False, True, False])


def test_top_p_sees_the_temperature() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.2]], np.float32))
    counts = [(probs_of(logits, TOP_P, temperature=t, top_p=0.6) > 0).sum() for t in (0.25, 1.0, 100.0)]
    assert counts == [1, 2, 2]


def test_greedy_is_a_point_mass_at_the_first_of_the_best() -> None:
    logits = jnp.asarray([[0.0, 2.0, 2.0], [3.0, 1.0, 0.0]])
    found = distribution(logits, GREEDY, jnp.float32(0.7), jnp.float32(1.0))
    np.testing.assert_array_equal(found, [[-np.inf, 0, -np.inf], [0, -np.inf, -np.inf]])


@pytest.mark.parametrize(
    "method,truncates", [(TEMPERATURE, False), (GREEDY, True), (TOP_K, True), (TOP_P, True), (TOP_K_TOP_P, True)]
)
def test_truncates(method: SamplingMethod, truncates: bool) -> None:
    assert method.truncates is truncates


WIDE = 300
"""Three blocks of the draw, the last one padded."""
METHODS = {
    "plain": TEMPERATURE,
    "greedy": GREEDY,
    "top_k": SamplingMethod(top_k=140),
    "top_p": TOP_P,
    "both": SamplingMethod(top_k=140, nucleus=True),
}


@cache
def wide_logits(rows: int) -> np.ndarray:
    logits = np.random.default_rng(5).standard_normal((rows, WIDE)).astype(np.float32) * 2
    logits[:, 128:256:2] = -np.inf
    return logits


def fused(
    logits: np.ndarray, keys: jax.Array, method: SamplingMethod, temperature: float, top_p: float
) -> SampledTokens:
    return jax.device_get(sample(logits, method, jnp.float32(temperature), jnp.float32(top_p), keys))


def fits(counts: np.ndarray, probs: np.ndarray) -> bool:
    """Chi-square, rare tokens together; a token of probability 0 must not occur."""
    expected = counts.sum() * probs / probs.sum()
    common = expected >= 5
    observed, wanted = counts[common], expected[common]
    if (rest := expected[~common].sum()) > 0:
        observed, wanted = np.append(observed, counts[~common].sum()), np.append(wanted, rest)
    return counts[probs == 0].sum() == 0 and chisquare(observed, wanted).pvalue > 1e-3


def drawn(key: jax.Array, logits_V: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One row's token and log-normaliser."""
    tokens, masses = draw(gumbel_noise(key[None], draw_size(logits_V.size)), logits_V[None])
    return tokens[0], masses[0]


@pytest.mark.parametrize("size", [5, 128, 129, 300])
def test_draw_follows_the_distribution_and_never_a_removed_token(size: int) -> None:
    """One block, a full block, several, and a padded last one."""
    rng = np.random.default_rng(size)
    probs = rng.dirichlet(np.ones(size))
    probs[rng.random(size) < 0.3] = 0.0
    probs[size - 1] = 0.3
    probs /= probs.sum()
    logits = jnp.log(jnp.asarray(probs, jnp.float32)) + 7.0
    keys = jax.random.split(jax.random.key(size), 20_000)
    tokens, mass = jax.jit(jax.vmap(lambda key: drawn(key, logits)))(keys)
    assert tokens.dtype == jnp.int32
    np.testing.assert_allclose(mass, 7.0, rtol=1e-6)
    assert fits(np.bincount(tokens, minlength=size), probs)


def test_draw_is_exact_in_a_vocabulary_of_128_thousand() -> None:
    """Half of the mass is in one token, half in a tail whose tokens have about 4e-6 each, every third removed."""
    size, n = 128_256, 6_000
    tail = np.linspace(-1.0, 1.0, size)
    tail[::3] = -np.inf
    mass = np.log(np.exp(tail).sum())
    tail[77_000] = mass
    logits = jnp.asarray(tail, jnp.float32)[None]
    keys = jax.random.split(jax.random.key(1), n)
    tokens = np.asarray(jax.jit(jax.vmap(lambda key: drawn(key, logits[0])[0]))(keys))
    assert np.isfinite(tail[tokens]).all()
    head = tokens == 77_000
    assert abs(head.mean() - 0.5) < 4 * 0.5 / np.sqrt(n)
    tail[77_000] = -np.inf
    found = np.bincount(tokens[~head] // 4000, minlength=size // 4000 + 1)
    assert fits(found, np.bincount(np.arange(size) // 4000, np.exp(tail)))
    place = np.bincount(tokens[~head] % 128, minlength=128)
    assert fits(place, np.bincount(np.arange(size) % 128, np.exp(tail)))


def test_the_noise_is_fine_at_its_upper_end() -> None:
    """23 bits put the largest values on a grid of steps of 1e-7 in probability, too coarse for a token of 1e-8."""
    noise = np.asarray(jax.jit(gumbel_noise, static_argnums=1)(jax.random.split(jax.random.key(2), 1024), 1024))
    assert len(np.unique(np.sort(noise, axis=None)[-64:])) == 64
    assert kstest(noise[:, :20].ravel(), "gumbel_r").pvalue > 1e-3


@pytest.mark.parametrize("top_p", [0.7, 1.0])
@pytest.mark.parametrize("temperature", [0.6, 1.5])
@pytest.mark.parametrize("name", METHODS)
def test_fused_log_probs_are_those_of_the_definition(name: str, temperature: float, top_p: float) -> None:
    logits, rows = wide_logits(64), np.arange(64)
    out = fused(logits, jax.random.split(jax.random.key(0), 64), METHODS[name], temperature, top_p)
    numbers = jnp.float32(temperature), jnp.float32(top_p)
    table = np.asarray(distribution(jnp.asarray(logits), METHODS[name], *numbers))
    np.testing.assert_allclose(out.sampler_logps, table[rows, out.tokens], atol=2e-6)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(out.policy_logps, exact[rows, out.tokens], atol=2e-6)
    assert out.tokens.dtype == np.int32


@pytest.mark.parametrize("name", METHODS)
def test_fused_draw_follows_the_definition(name: str) -> None:
    n = 8_000
    logits = np.broadcast_to(wide_logits(1), (n, WIDE))
    out = fused(logits, jax.random.split(jax.random.key(4), n), METHODS[name], 1.3, 0.8)
    probs = numpy_distribution(logits[0], METHODS[name], 1.3, 0.8)
    if METHODS[name].greedy:
        assert (out.tokens == probs.argmax()).all()
    else:
        assert fits(np.bincount(out.tokens, minlength=WIDE), probs)


@pytest.mark.parametrize("name", METHODS)
def test_a_row_is_drawn_alike_in_any_batch_and_slot(name: str) -> None:
    logits, keys = wide_logits(64), jax.random.split(jax.random.key(9), 64)
    out = fused(logits, keys, METHODS[name], 0.9, 0.8)
    order = np.random.default_rng(0).permutation(64)[:7]
    part = fused(logits[order], keys[order], METHODS[name], 0.9, 0.8)
    np.testing.assert_array_equal(part.tokens, out.tokens[order])
    np.testing.assert_allclose(part.sampler_logps, out.sampler_logps[order], atol=1e-6)


def test_rows_and_positions_are_independent() -> None:
    """Two tokens from keys that differ in the position, and two of adjacent rows: their pairs are products."""
    probs = np.array([0.4, 0.3, 0.2, 0.1])
    logits = jnp.log(jnp.asarray(probs, jnp.float32))
    keys = row_keys(np.int32(0), np.int32(0), np.arange(10_000, dtype=np.int32), np.zeros(10_000, np.int32))
    at = jax.jit(jax.vmap(lambda key, t: drawn(jax.random.fold_in(key, t), logits)[0], (0, None)))
    first, second = np.asarray(at(keys, 0)), np.asarray(at(keys, 1))
    pairs = np.outer(probs, probs).ravel()
    assert fits(np.bincount(first * 4 + second, minlength=16), pairs)
    assert fits(np.bincount(first[::2] * 4 + first[1::2], minlength=16), pairs)


def test_temperatures_vmap() -> None:
    """As a sweep over arms would: each temperature as if alone."""
    logits, keys = wide_logits(4), jax.random.split(jax.random.key(0), 4)
    sweep = jax.vmap(lambda t: sample_token(jnp.asarray(logits), TOP_P, t, jnp.float32(0.7), keys))
    out = jax.jit(sweep)(jnp.asarray([0.5, 2.0]))
    alone = fused(logits, keys, TOP_P, 2.0, 0.7)
    np.testing.assert_array_equal(out.tokens[1], alone.tokens)
    np.testing.assert_allclose(out.sampler_logps[1], alone.sampler_logps, atol=1e-6)


def test_row_keys_differ_in_every_counter() -> None:
    keys = jax.jit(row_keys)
    grid = np.stack(np.meshgrid(*[np.arange(3)] * 4, indexing="ij"), -1).reshape(-1, 4).astype(np.int32)
    found = [jax.random.key_data(keys(s, t, p[None], g[None]))[0] for s, t, p, g in grid]
    assert len({tuple(np.asarray(key).tolist()) for key in found}) == len(grid)
    padding = jax.random.key_data(keys(np.int32(0), np.int32(0), np.array([-1], np.int32), np.zeros(1, np.int32)))
    assert np.asarray(padding).shape == (1, 2), "ids below 0, which fill a batch, are allowed"
