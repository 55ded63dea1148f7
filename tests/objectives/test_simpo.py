"""SimPO against explicit loops, its target margin, and lengths."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.simpo import simpo_loss
from tests.objectives.cases import SEEDS, random_logps

NAMES = ("policy_chosen_logps", "policy_rejected_logps", "chosen_lengths", "rejected_lengths")
jit_loss = jax.jit(simpo_loss)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_golden(label_smoothing):
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        batch, beta, gamma = [5, 1][seed % 2], float(rng.uniform(0.5, 5)), float(rng.uniform(0, 2))
        lengths = rng.integers(1, 9, (2, batch)).astype(np.float32)
        logps = np.stack([random_logps(rng, batch) * n for n in lengths])
        if seed % 5 == 0:
            logps[1], lengths[1] = logps[0], lengths[0]  # tie
        rows = dict(zip(NAMES, [*logps, *lengths], strict=True))
        got = jit_loss(**rows, beta=beta, gamma=gamma, label_smoothing=label_smoothing)
        for b in range(batch):
            chosen, rejected = (beta * float(logps[i, b]) / float(lengths[i, b]) for i in range(2))
            d = chosen - rejected - gamma
            loss = (1 - label_smoothing) * math.log1p(math.exp(-d))
            loss += label_smoothing * math.log1p(math.exp(d))
            expected = {
                "losses": loss,
                "rewards_chosen": chosen,
                "rewards_rejected": rejected,
                "reward_margin": chosen - rejected,
                "reward_accuracy": float(chosen > rejected),
                "logps_chosen": float(logps[0, b]),
                "logps_rejected": float(logps[1, b]),
            }
            outputs = {"losses": got.losses, **got.metrics}
            assert set(outputs) == set(expected)
            for name, value in expected.items():
                np.testing.assert_allclose(
                    outputs[name][b], value, rtol=1e-5, atol=1e-5, err_msg=f"{name}, seed {seed}"
                )


def loss_and_gradient(chosen, rejected, lengths=(1.0, 1.0), beta=2.0, gamma=0.0):
    def loss(chosen, rejected):
        rows = dict(zip(NAMES, [chosen, rejected, *jnp.array(lengths)[:, None]], strict=True))
        return simpo_loss(**rows, beta=beta, gamma=gamma).losses[0]

    return jax.value_and_grad(loss, (0, 1))(jnp.array([chosen]), jnp.array([rejected]))


def test_log_2_where_the_margin_is_met_and_contrastive_there():
    value, gradient = loss_and_gradient(-1.0, -1.75, gamma=1.5)
    np.testing.assert_allclose(value, math.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-1.0], [1.0]], rtol=1e-6)


def test_repeating_a_sequence_changes_nothing_but_its_gradient_per_log_prob():
    value, gradient = loss_and_gradient(-1.0, -3.0)
    longer, longer_gradient = loss_and_gradient(-4.0, -3.0, lengths=(4.0, 1.0))
    np.testing.assert_allclose(longer, value, rtol=1e-6)
    np.testing.assert_allclose(longer_gradient[0] * 4, gradient[0], rtol=1e-6)


def test_swapping_chosen_and_rejected_negates_the_margin():
    rows = [jnp.array([-3.0, -1.0]), jnp.array([-2.0, -8.0]), jnp.array([3.0, 2.0]), jnp.array([1.0, 5.0])]
    one, other = (
        simpo_loss(**dict(zip(NAMES, [rows[i] for i in order], strict=True)), beta=2.0, gamma=0.5)
        for order in ((0, 1, 2, 3), (1, 0, 3, 2))
    )
    np.testing.assert_array_equal(one.metrics["reward_margin"], -other.metrics["reward_margin"])


@pytest.mark.parametrize("gap", [-1e4, 1e4])
def test_extreme_margins_are_finite(gap):
    value, gradient = loss_and_gradient(gap, 0.0, gamma=1.0)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))
    np.testing.assert_allclose(gradient, [[-2.0 if gap < 0 else 0.0], [2.0 if gap < 0 else 0.0]])


def test_shapes_that_would_broadcast_are_refused():
    rows = dict.fromkeys(NAMES, jnp.ones(3)) | {"chosen_lengths": jnp.ones(1)}
    with pytest.raises(AssertionError):
        simpo_loss(**rows, beta=1.0, gamma=0.0)
