"""The distribution that each method draws from, against NumPy, and the draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from research.sampling.methods import SamplingMethod, draw, nucleus_mask, row_keys, sampling_logps
from tests.research.sampling.reference import numpy_distribution
from tests.research.sampling.tiny import GREEDY, TEMPERATURE, TOP_K, TOP_K_TOP_P, TOP_P

V = 7
LOGITS = np.random.default_rng(0).standard_normal((5, V)).astype(np.float32) * 2
distribution = jax.jit(sampling_logps, static_argnames="method")


def probs_of(
    logits: np.ndarray, method: SamplingMethod, temperature: float = 1.0, top_p: float = 1.0
) -> np.ndarray:
    logps = distribution(jnp.asarray(logits), method, jnp.float32(temperature), jnp.float32(top_p))
    return np.exp(np.asarray(logps, np.float64))


def kept(probs: list[float], top_p: float) -> list[int]:
    mask = jax.jit(nucleus_mask)(jnp.log(jnp.asarray([probs], jnp.float32)), jnp.float32(top_p))
    return np.flatnonzero(mask[0]).tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
@pytest.mark.parametrize("top_p", [0.2, 0.6, 0.95, 1.0])
@pytest.mark.parametrize(
    "method",
    [TEMPERATURE, GREEDY, TOP_K, TOP_P, TOP_K_TOP_P],
    ids=["plain", "greedy", "top_k", "top_p", "both"],
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


def test_top_k_keeps_ties_with_the_kth() -> None:
    found = probs_of(np.array([[0.0, 1.0, 1.0, 2.0]], np.float32), SamplingMethod(top_k=2))
    np.testing.assert_array_equal(found[0] > 0, [False, True, True, True])


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


def test_top_p_sees_the_temperature() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.2]], np.float32))
    counts = [(probs_of(logits, TOP_P, temperature=t, top_p=0.6) > 0).sum() for t in (0.25, 1.0, 100.0)]
    assert counts == [1, 2, 2]


def test_greedy_is_a_point_mass_at_the_first_of_the_best() -> None:
    logits = jnp.asarray([[0.0, 2.0, 2.0], [3.0, 1.0, 0.0]])
    found = distribution(logits, GREEDY, jnp.float32(0.7), jnp.float32(1.0))
    np.testing.assert_array_equal(found, [[-np.inf, 0, -np.inf], [0, -np.inf, -np.inf]])


@pytest.mark.parametrize(
    "method,truncates",
    [(TEMPERATURE, False), (GREEDY, True), (TOP_K, True), (TOP_P, True), (TOP_K_TOP_P, True)],
)
def test_truncates(method: SamplingMethod, truncates: bool) -> None:
    assert method.truncates is truncates


def test_draw_follows_the_distribution_and_never_a_removed_token() -> None:
    probs = np.array([0.5, 0.0, 0.3, 0.15, 0.05])
    logps = jnp.broadcast_to(jnp.log(jnp.asarray(probs, jnp.float32)), (20_000, 5))
    tokens = jax.jit(draw)(jax.random.split(jax.random.key(0), 20_000), logps)
    assert tokens.dtype == jnp.int32
    counts = np.bincount(tokens, minlength=5)
    assert counts[1] == 0
    live = probs > 0
    assert chisquare(counts[live], 20_000 * probs[live]).pvalue > 1e-3


def test_row_keys_differ_in_every_counter() -> None:
    keys = jax.jit(row_keys)
    grid = np.stack(np.meshgrid(*[np.arange(3)] * 4, indexing="ij"), -1).reshape(-1, 4).astype(np.int32)
    found = [jax.random.key_data(keys(s, t, p[None], g[None]))[0] for s, t, p, g in grid]
    assert len({tuple(np.asarray(key).tolist()) for key in found}) == len(grid)
    padding = jax.random.key_data(
        keys(np.int32(0), np.int32(0), np.array([-1], np.int32), np.zeros(1, np.int32))
    )
    assert np.asarray(padding).shape == (1, 2), "ids below 0, which fill a batch, are allowed"
