"""ORPO against explicit loops, its limits, and log-odds that stay finite."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.orpo import orpo_loss
from tests.objectives.cases import SEEDS, random_logps

jit_loss = jax.jit(orpo_loss)


def random_case(seed):
    rng = np.random.default_rng(seed)
    batch = [5, 1][seed % 2]
    lengths = rng.integers(1, 9, (2, batch)).astype(np.float32)
    logps = np.stack([random_logps(rng, batch) * n * [1.0, 0.05][seed % 3 == 0] for n in lengths])
    if seed % 5 == 0:
        logps[1], lengths[1] = logps[0], lengths[0]  # tie
    return rng, logps, lengths


def arguments(logps, lengths):
    names = ("policy_chosen_logps", "policy_rejected_logps", "chosen_lengths", "rejected_lengths")
    return dict(zip(names, [*map(jnp.asarray, logps), *map(jnp.asarray, lengths)], strict=True))


def test_golden():
    for seed in SEEDS:
        rng, logps, lengths = random_case(seed)
        coef = float(rng.uniform(0.05, 2))
        got = jit_loss(**arguments(logps, lengths), lambda_coef=coef)
        for b in range(logps.shape[1]):
            mean_c, mean_r = (float(logps[i, b]) / float(lengths[i, b]) for i in range(2))
            odds_c, odds_r = (math.exp(a) / -math.expm1(a) for a in (mean_c, mean_r))
            contrast = -math.log(odds_c / (odds_c + odds_r))  # sigmoid(log x) = x / (1 + x)
            expected = {
                "losses": -mean_c + coef * contrast,
                "nll_chosen": -mean_c,
                "log_odds_ratio": math.log(odds_c / odds_r),
                "odds_ratio_loss": contrast,
                "rewards_chosen": coef * mean_c,
                "rewards_rejected": coef * mean_r,
                "reward_margin": coef * (mean_c - mean_r),
                "reward_accuracy": float(mean_c > mean_r),
                "logps_chosen": float(logps[0, b]),
                "logps_rejected": float(logps[1, b]),
            }
            outputs = {"losses": got.losses, **got.metrics}
            assert set(outputs) == set(expected)
            for name, value in expected.items():
                np.testing.assert_allclose(
                    outputs[name][b], value, rtol=1e-5, atol=1e-5, err_msg=f"{name}, seed {seed}"
                )


def test_equal_means_cost_the_nll_plus_lambda_log_2_whatever_the_lengths():
    logps, lengths = jnp.array([[-6.0], [-2.0]]), jnp.array([[3.0], [1.0]])
    output = orpo_loss(**arguments(logps, lengths), lambda_coef=0.3)
    np.testing.assert_allclose(output.losses, 2.0 + 0.3 * math.log(2), rtol=1e-6)
    assert float(output.metrics["reward_accuracy"][0]) == 0.0


def test_without_lambda_it_is_supervised_learning():
    def total(chosen, rejected):
        lengths = jnp.array([[4.0], [2.0]])
        return orpo_loss(**arguments([chosen, rejected], lengths), lambda_coef=0.0).losses.sum()

    gradient = jax.grad(total, (0, 1))(jnp.array([-3.0]), jnp.array([-5.0]))
    np.testing.assert_allclose(gradient, [[-0.25], [0.0]])


def test_swapping_chosen_and_rejected_negates_the_log_odds_ratio():
    _, logps, lengths = random_case(4)
    one = orpo_loss(**arguments(logps, lengths), lambda_coef=0.5).metrics
    other = orpo_loss(**arguments(logps[::-1], lengths[::-1]), lambda_coef=0.5).metrics
    for name in ("log_odds_ratio", "reward_margin"):
        np.testing.assert_array_equal(one[name], -other[name])


@pytest.mark.parametrize("chosen", [-1e4, -50.0, -1e-4, -1e-9, 0.0])
@pytest.mark.parametrize("rejected", [-1e4, -1e-4, 0.0])
def test_certain_and_impossible_sequences_stay_finite(chosen, rejected):
    def total(chosen, rejected):
        lengths = jnp.array([[1.0], [1.0]])
        return orpo_loss(**arguments([chosen, rejected], lengths), lambda_coef=1.0).losses.sum()

    results = jax.value_and_grad(total, (0, 1))(jnp.array([chosen]), jnp.array([rejected]))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(results))


def test_a_certain_sequence_has_the_log_odds_of_a_millionth_of_a_nat():
    ones = jnp.ones(1)
    got = orpo_loss(**arguments([0 * ones, -math.log(2) * ones], [ones, ones]), lambda_coef=1.0)
    at_a_millionth = -1e-6 - math.log(-math.expm1(-1e-6))  # the other's log-odds are 0
    np.testing.assert_allclose(got.metrics["log_odds_ratio"], at_a_millionth, rtol=1e-5)


def test_log_odds_keep_their_digits_on_both_sides_of_log_2():
    means = np.concatenate([-np.logspace(-5, 1.2, 40), [-math.log(2)]]).astype(np.float32)
    ones = np.ones_like(means)
    got = jit_loss(**arguments([means, -ones], [ones, ones]), lambda_coef=1.0).metrics["log_odds_ratio"]
    at_1 = -1.0 - math.log(-math.expm1(-1.0))
    expected = [float(a) - math.log(-math.expm1(float(a))) - at_1 for a in means]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(AssertionError):
        orpo_loss(**arguments(jnp.zeros((2, 3)), jnp.ones((2, 1))), lambda_coef=0.1)
