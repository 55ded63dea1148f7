"""Sigmoid DPO against explicit scalar arithmetic, and its limits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.dpo import dpo_loss
from tests.objectives.cases import SEEDS, random_logps

NAMES = ["policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps"]
jit_loss = jax.jit(dpo_loss)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
def test_golden(label_smoothing):
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        batch, beta = [5, 1][seed % 2], float(rng.uniform(0.01, 2))
        logps = [random_logps(rng, batch) * 10 for _ in NAMES]
        if seed % 5 == 0:
            logps[1], logps[3] = logps[0], logps[2]  # tie
        got = jit_loss(**dict(zip(NAMES, logps, strict=True)), beta=beta, label_smoothing=label_smoothing)
        for b, (chosen, rejected, ref_chosen, ref_rejected) in enumerate(np.stack(logps, 1).astype(float)):
            reward_chosen, reward_rejected = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
            margin = reward_chosen - reward_rejected
            loss = (1 - label_smoothing) * math.log1p(math.exp(-margin))
            loss += label_smoothing * math.log1p(math.exp(margin))
            expected = {
                "rewards_chosen": reward_chosen,
                "rewards_rejected": reward_rejected,
                "reward_margin": margin,
                "reward_accuracy": float(margin > 0),
                "logps_chosen": chosen,
                "logps_rejected": rejected,
            }
            assert set(expected) == set(got.metrics)
            np.testing.assert_allclose(got.losses[b], loss, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}")
            for name, value in expected.items():
                np.testing.assert_allclose(got.metrics[name][b], value, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_at_the_reference_the_loss_is_log_2_and_the_gradient_contrastive(beta, label_smoothing):
    chosen, rejected = jnp.array([-3.0, -40.0]), jnp.array([-7.0, -1.0])

    def loss(policy_chosen, policy_rejected):
        args = dict(zip(NAMES, [policy_chosen, policy_rejected, chosen, rejected], strict=True))
        return dpo_loss(**args, beta=beta, label_smoothing=label_smoothing).losses.sum()

    np.testing.assert_allclose(loss(chosen, rejected) / 2, math.log(2), rtol=1e-6)
    slope = beta * (0.5 - label_smoothing) * jnp.ones(2)
    for gradient, expected in zip(jax.grad(loss, (0, 1))(chosen, rejected), (-slope, slope), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-5)


@pytest.mark.parametrize("margin", [-1e4, -90.0, 90.0, 1e4])
def test_extreme_margins_are_finite(margin):
    def loss(policy_chosen):
        args = dict(zip(NAMES, [policy_chosen, *[jnp.zeros(1)] * 3], strict=True))
        return dpo_loss(**args, beta=1.0).losses[0]

    value, gradient = jax.value_and_grad(loss)(jnp.array([margin]))
    np.testing.assert_allclose(value, max(-margin, 0.0), atol=1e-6)
    np.testing.assert_allclose(gradient, [-1.0 if margin < 0 else 0.0], atol=1e-6)


def test_shapes_that_would_broadcast_are_refused():
    arrays = dict.fromkeys(NAMES, jnp.zeros(3)) | {"ref_chosen_logps": jnp.zeros(1)}
    with pytest.raises(AssertionError):
        dpo_loss(**arrays, beta=0.1)
