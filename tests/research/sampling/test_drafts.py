"""One round: its random numbers, unnormalised distributions, and that accepted and drawn tokens follow the target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from research.sampling.drafts import Categorical, Noise, Proposals, verify
from research.sampling.methods import SamplingMethod, draw, draw_size, scaled_logits
from tests.research.sampling.tiny import TEMPERATURE, TOP_K, TOP_P


def test_noise_is_gumbel_and_uniform_and_each_row_its_own() -> None:
    keys = jax.random.split(jax.random.key(4), 600)
    noise = jax.jit(lambda keys: Noise.of(keys, 3, 300))(keys)
    assert noise.draws.shape == (600, 4, draw_size(300)) and noise.accept.shape == (600, 3)
    assert kstest(np.asarray(noise.draws).ravel()[::7], "gumbel_r").pvalue > 1e-3
    assert kstest(np.exp(np.asarray(noise.accept)).ravel(), "uniform").pvalue > 1e-3
    numbers = [np.asarray(noise.draws).reshape(600, -1), np.asarray(noise.accept)]
    together = np.corrcoef(np.concatenate(numbers, axis=1).T)
    assert np.abs(together - np.eye(len(together))).max() < 6 / np.sqrt(600)  # no number serves twice
    alone = Noise.of(keys[17:18], 3, 300)
    np.testing.assert_array_equal(alone.draws[0], noise.draws[17])
    np.testing.assert_array_equal(alone.accept[0], noise.accept[17])


def test_unnormalised_logits_give_normalised_log_probs() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    logits[0, 1, 2] = -np.inf
    logps = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    distribution = Categorical(jnp.asarray(logits), jax.nn.logsumexp(logits, axis=-1))
    tokens, places = np.array([[0, 2], [4, 1]]), np.array([1, 2])
    found = distribution.logps_of(jnp.asarray(tokens))
    np.testing.assert_allclose(found, np.take_along_axis(logps[:, :2], tokens[..., None], 2)[..., 0], rtol=1e-6)
    np.testing.assert_allclose(distribution.logps_at(jnp.asarray(places)), logps[[0, 1], places], rtol=1e-6)


def test_what_is_hardly_likely_can_be_accepted() -> None:
    """The smallest of a million uniform numbers are no multiples of 2^-23, of which one would be 0 now and then."""
    noise = jax.jit(lambda keys: Noise.of(keys, 100, 2).accept)
    log_u = np.sort(np.asarray(noise(jax.random.split(jax.random.key(0), 10_000)), np.float64).ravel())
    steps = np.exp(log_u[:20]) * 2**23
    assert steps.max() < 400 and np.abs(steps - steps.round()).max() > 0.1


@pytest.mark.parametrize("method", [TEMPERATURE, TOP_K, TOP_P], ids=["temperature", "top_k", "top_p"])
@pytest.mark.parametrize("certain", [False, True])
def test_tokens_of_a_round_follow_the_target(method: SamplingMethod, certain: bool) -> None:
    """Token i of the rounds that came so far, whether proposed, drawn in its place or drawn after the last."""
    B, k, V = 20_000, 2, 150
    rng = np.random.default_rng(V)
    p = rng.normal(size=(k + 1, V), scale=3.0).astype(np.float32)
    q = p[:k] + rng.normal(size=(k, V)).astype(np.float32) - 20
    p, q = (scaled_logits(jnp.asarray(x), method, jnp.float32(0.9), jnp.float32(0.8)) for x in (p, q))

    @jax.jit
    def round_of(keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        noise = Noise.of(keys_B, k, V)
        if certain:
            likeliest = jnp.broadcast_to(jnp.argmax(p[:k], axis=-1)[None], (B, k))
            proposals = Proposals(likeliest.astype(jnp.int32), None)
        else:
            drawn = [draw(noise.draws[:, i], jnp.broadcast_to(q[i][None], (B, V))) for i in range(k)]
            tokens, masses = (jnp.stack(x, axis=1) for x in zip(*drawn, strict=True))
            proposals = Proposals(tokens, Categorical(jnp.broadcast_to(q[None], (B, k, V)), masses))
        mass = jax.nn.logsumexp(p, axis=-1)
        target = Categorical(jnp.broadcast_to(p[None], (B, k + 1, V)), jnp.broadcast_to(mass[None], (B, k + 1)))
        return verify(proposals, target, noise, greedy=False)

    accepted, tokens = map(np.asarray, round_of(jax.random.split(jax.random.key(3), B)))
    assert 0.1 < accepted.mean() / k < 0.9
    for i, probs in enumerate(np.asarray(jax.nn.softmax(p, axis=-1)).astype(np.float64)):
        came = accepted >= i
        counts, expected = np.bincount(tokens[came, i], minlength=V), probs / probs.sum() * came.sum()
        assert not counts[expected == 0].any()
        often = expected >= 5
        cells = [np.append(x[often], x[~often].sum()) for x in (counts, expected)]
        kept = cells[1] > 1e-6
        assert chisquare(cells[0][kept], cells[1][kept]).pvalue > 1e-3, i
