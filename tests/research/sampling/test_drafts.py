"""The random numbers of a round, and what is left of a law that is not normalised."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import kstest

from research.sampling.drafts import Law, Noise
from research.sampling.methods import draw_size


def test_noise_is_gumbel_and_uniform_and_each_row_its_own() -> None:
    keys = jax.random.split(jax.random.key(4), 600)
    noise = jax.jit(lambda keys: Noise.of(keys, draft_tokens=3, vocab_size=300))(keys)
    assert noise.draws.shape == (600, 4, draw_size(300)) and noise.accept.shape == (600, 3)
    assert kstest(np.asarray(noise.draws).ravel()[::7], "gumbel_r").pvalue > 1e-3
    assert kstest(np.exp(np.asarray(noise.accept)).ravel(), "uniform").pvalue > 1e-3
    both = np.concatenate(
        [np.asarray(noise.draws).reshape(600, -1)[:, -30:], np.asarray(noise.accept)], axis=1
    )
    together = np.corrcoef(both.T) - np.eye(both.shape[1])
    assert np.abs(together).max() < 5 / np.sqrt(600)  # no number serves twice
    alone = Noise.of(keys[17:18], draft_tokens=3, vocab_size=300)
    np.testing.assert_array_equal(alone.draws[0], noise.draws[17])
    np.testing.assert_array_equal(alone.accept[0], noise.accept[17])


def test_a_law_gives_normalised_log_probs() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    logits[0, 1, 2] = -np.inf
    logps = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    law = Law(jnp.asarray(logits), jax.nn.logsumexp(logits, axis=-1))
    tokens, places = np.array([[0, 2], [4, 1]]), np.array([1, 2])
    found = law.logps_of(jnp.asarray(tokens))
    np.testing.assert_allclose(
        found, np.take_along_axis(logps[:, :2], tokens[..., None], 2)[..., 0], rtol=1e-6
    )
    np.testing.assert_allclose(law.logps_at(jnp.asarray(places)), logps[[0, 1], places], rtol=1e-6)
