"""Length desensitising, on-policy weights, the reward shift and rank matching against explicit loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.dpo_terms import bco_delta_statistic, length_desensitized_logps, quantile_matched, wpo_weights
from objectives.reduce import sequence_sum
from tests.objectives.cases import SEEDS, SHAPES, fill, random_logps, random_mask

jit_ld = jax.jit(length_desensitized_logps)
jit_wpo = jax.jit(wpo_weights)
jit_matched = jax.jit(quantile_matched)


def test_length_desensitized_golden():
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        shape = SHAPES[seed % len(SHAPES)]
        mask, logps, alpha = random_mask(rng, *shape), random_logps(rng, *shape), float(rng.uniform())
        public = rng.integers(0, shape[1] + 2, shape[0])
        got = jit_ld(token_logps=fill(logps, mask), mask=mask, public_lengths=public, ld_alpha=alpha)
        for b in range(shape[0]):
            total, seen = 0.0, 0
            for t in range(shape[1]):
                if mask[b, t]:
                    total += float(logps[b, t]) * (1.0 if seen < public[b] else alpha)
                    seen += 1
            np.testing.assert_allclose(got[b], total, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}")


def test_alpha_1_is_the_plain_sum_and_alpha_0_truncates():
    logps, mask = jnp.array([[-1.0, -2.0, -4.0]]), jnp.ones((1, 3), bool)
    arguments = {"token_logps": logps, "mask": mask, "public_lengths": jnp.array([2])}
    np.testing.assert_allclose(length_desensitized_logps(**arguments, ld_alpha=1.0), sequence_sum(logps, mask))
    np.testing.assert_allclose(length_desensitized_logps(**arguments, ld_alpha=0.0), [-3.0])
    np.testing.assert_allclose(length_desensitized_logps(**arguments, ld_alpha=0.25), [-4.0])


def test_wpo_golden():
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        shape, vocabulary = SHAPES[seed % len(SHAPES)], 5
        mask = random_mask(rng, *shape)
        logits = rng.normal(size=(*shape, vocabulary))
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        tokens = rng.integers(vocabulary, size=shape)
        logps = np.log(np.take_along_axis(p, tokens[..., None], -1)[..., 0]).astype(np.float32)
        collision = np.log((p**2).sum(-1)).astype(np.float32)
        got = jit_wpo(token_logps=fill(logps, mask), log_collision=fill(collision, mask), mask=mask)
        for b in range(shape[0]):
            ratios = [p[b, t, tokens[b, t]] / sum(p[b, t] ** 2) for t in range(shape[1]) if mask[b, t]]
            expected = np.prod(ratios) ** (1 / len(ratios)) if ratios else 1.0
            np.testing.assert_allclose(got[b], expected, rtol=1e-5, err_msg=f"seed {seed}")


def test_wpo_weighs_a_uniform_policy_as_1_and_has_no_gradient():
    logps, mask = jnp.full((2, 3), -jnp.log(7.0)), jnp.ones((2, 3), bool)

    def total(logps):
        return wpo_weights(token_logps=logps, log_collision=logps, mask=mask).sum()

    value, gradient = jax.value_and_grad(total)(logps)
    np.testing.assert_allclose(value, 2.0, rtol=1e-6)
    assert not np.any(gradient)


def test_the_reward_shift_adds_over_micro_batches():
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        chosen, rejected = rng.normal(size=(2, 4)).astype(np.float32)
        weights = rng.choice([0.0, 1.0, 2.0], 4).astype(np.float32)
        parts = [
            bco_delta_statistic(rewards_chosen=chosen[rows], rewards_rejected=rejected[rows], weights=weights[rows])
            for rows in (slice(0, 1), slice(1, 4))
        ]
        total = sum(float(w) * (float(c) + float(r)) / 2 for c, r, w in zip(chosen, rejected, weights, strict=True))
        expected = total / weights.sum() if weights.sum() else 0.0
        np.testing.assert_allclose((parts[0] + parts[1]).mean(), expected, rtol=1e-5, atol=1e-6)


def test_quantile_matched_golden():
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        batch = [6, 1][seed % 2]
        values, targets = rng.normal(size=(2, batch)).astype(np.float32)
        if seed % 5 == 0:
            values[:] = values[0]  # all equal: by position
        weights = rng.choice([0.0, 1.0, 3.0], batch).astype(np.float32) if seed % 3 else None
        real = [b for b in range(batch) if weights is None or weights[b] > 0]
        ordered = sorted(float(targets[b]) for b in real)
        expected = np.zeros(batch)
        for rank, b in enumerate(sorted(real, key=lambda b: (float(values[b]), b))):
            expected[b] = ordered[rank]
        np.testing.assert_allclose(jit_matched(values, targets, weights), expected, err_msg=f"seed {seed}")


def test_the_bco_statistic_passes_no_gradient_and_refuses_rewards_that_would_broadcast():
    def delta(rewards):
        return bco_delta_statistic(rewards_chosen=rewards, rewards_rejected=rewards).mean()

    np.testing.assert_array_equal(jax.grad(delta)(jnp.array([1.0, 2.0])), [0.0, 0.0])
    for sizes in ((3, 1), (1, 3)):
        chosen, rejected = map(jnp.zeros, sizes)
        with pytest.raises(AssertionError):
            bco_delta_statistic(rewards_chosen=chosen, rewards_rejected=rejected)
