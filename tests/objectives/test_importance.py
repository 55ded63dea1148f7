"""Sampler-against-trainer importance weights against explicit loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.importance import importance_weights
from tests.objectives.cases import SEEDS, SHAPES, fill, random_logps, random_mask

jit_weights = functools.partial(jax.jit, static_argnames=("level", "mode"))(importance_weights)


@pytest.mark.parametrize("floor", [0.0, 0.6])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_golden(level, mode, floor):
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        shape = SHAPES[seed % len(SHAPES)]
        mask = random_mask(rng, *shape)
        old = random_logps(rng, *shape)
        sampler = old + rng.normal(scale=0.0 if seed % 5 == 0 else 0.5, size=shape).astype(np.float32)
        expected = np.zeros(shape)
        for b, t in zip(*np.nonzero(mask), strict=True):
            slots = np.flatnonzero(mask[b]) if level == "sequence" else [t]
            weight = np.prod([np.exp(float(old[b, u]) - float(sampler[b, u])) for u in slots])
            if mode == "truncate":
                expected[b, t] = min(max(weight, floor), 1.5)
            else:
                expected[b, t] = weight if floor <= weight <= 1.5 else 0.0
        got = jit_weights(
            old_logps=fill(old, mask),
            sampler_logps=fill(sampler, mask),
            completion_mask=mask,
            level=level,
            mode=mode,
            cap=1.5,
            floor=floor,
        )
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}")


def call(old, sampler, **options):
    mask = jnp.ones(old.shape, bool)
    arrays = {"old_logps": old, "sampler_logps": sampler, "completion_mask": mask}
    return importance_weights(**arrays, **{"level": "token", "mode": "truncate", "cap": 2.0} | options)


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_sampler_that_agrees_has_weight_one(level, mode):
    logps = jnp.array([[-1.0, -2.0, -0.5]])
    np.testing.assert_array_equal(call(logps, logps, level=level, mode=mode), jnp.ones((1, 3)))


def test_weights_make_the_samplers_expectation_the_trainers():
    """`E_sampler[w f] = E_old[f]` on a categorical, where the cap does not bind."""
    old, sampler, f = jax.random.normal(jax.random.key(0), (3, 6))
    old, sampler = jax.nn.log_softmax(old), jax.nn.log_softmax(sampler)
    weights = call(old[:, None], sampler[:, None], cap=1e6)[:, 0]
    np.testing.assert_allclose(jnp.sum(jnp.exp(sampler) * weights * f), jnp.sum(jnp.exp(old) * f), rtol=1e-5, atol=1e-6)


def test_no_gradient_passes_and_far_apart_is_finite():
    zeros = jnp.zeros((1, 2))
    gradient = jax.grad(lambda x: call(x, zeros, cap=9.0).sum())(zeros)
    np.testing.assert_array_equal(gradient, zeros)
    np.testing.assert_array_equal(call(zeros + 500.0, zeros), zeros + 2.0)
    np.testing.assert_array_equal(call(zeros + 500.0, zeros, mode="mask"), zeros)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "word"}, "level: got 'word', expected one of token, sequence"),
        ({"mode": "drop"}, "mode: got 'drop', expected one of truncate, mask"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((1, 1)), jnp.zeros((1, 1)), **options)
