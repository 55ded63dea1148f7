"""The KL estimators on an explicit categorical, where every expectation is a finite sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.kl import kl_estimate
from tests.objectives.cases import SEEDS, random_logps

FORMULAS = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: np.exp(-d) - 1 + d}


@pytest.mark.parametrize("estimator", FORMULAS)
def test_golden(estimator):
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        policy, ref = random_logps(rng, 3, 4), random_logps(rng, 3, 4)
        if seed % 4 == 0:
            policy = ref
        expected = [
            [FORMULAS[estimator](float(p) - float(r)) for p, r in zip(*rows, strict=True)]
            for rows in zip(policy, ref, strict=True)
        ]
        got = kl_estimate(jnp.asarray(policy), jnp.asarray(ref), estimator)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}")


@pytest.fixture
def categorical():
    logits, ref_logits = jax.random.normal(jax.random.key(0), (2, 6)) * 1.5
    return logits, jax.nn.log_softmax(ref_logits)


def kl(p_logps, q_logps):
    return jnp.sum(jnp.exp(p_logps) * (p_logps - q_logps))


def expected_gradient(logits, ref_logps, estimator):
    """`E_{v ~ pi}[grad k(v)]`: the sampling probabilities are constants, as in a loss on sampled tokens."""
    probs = jax.nn.softmax(logits)
    return jax.grad(lambda z: jnp.sum(probs * kl_estimate(jax.nn.log_softmax(z), ref_logps, estimator)))(logits)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_value_is_unbiased(categorical, estimator):
    logits, ref_logps = categorical
    logps = jax.nn.log_softmax(logits)
    expectation = jnp.sum(jnp.exp(logps) * kl_estimate(logps, ref_logps, estimator))
    np.testing.assert_allclose(expectation, kl(logps, ref_logps), rtol=1e-5)


def test_k1_as_a_loss_has_no_expected_gradient(categorical):
    np.testing.assert_allclose(expected_gradient(*categorical, "k1"), jnp.zeros(6), atol=1e-6)


def test_k2_as_a_loss_descends_the_reverse_kl(categorical):
    logits, ref_logps = categorical
    expected = jax.grad(lambda z: kl(jax.nn.log_softmax(z), ref_logps))(logits)
    np.testing.assert_allclose(expected_gradient(logits, ref_logps, "k2"), expected, rtol=1e-4, atol=1e-6)


def test_k3_as_a_loss_descends_the_forward_kl(categorical):
    logits, ref_logps = categorical
    expected = jax.grad(lambda z: kl(ref_logps, jax.nn.log_softmax(z)))(logits)
    np.testing.assert_allclose(expected_gradient(logits, ref_logps, "k3"), expected, rtol=1e-4, atol=1e-6)


def test_k3_is_accurate_near_zero_and_never_negative():
    log_ratio = jnp.array([0.0, 1e-3, -1e-3, 1e-2, -0.5, 3.0])
    exact = np.expm1(-np.asarray(log_ratio, float)) + np.asarray(log_ratio, float)
    got = kl_estimate(log_ratio, jnp.zeros(6), "k3")
    np.testing.assert_allclose(got, exact, rtol=1e-3)
    assert np.all(np.asarray(got) >= 0)


@pytest.mark.parametrize("gap", [19.9, 20.0, 20.1, 100.0, 1e4])
def test_k3_far_apart_is_finite_with_the_right_gradient(gap):
    def k3(policy):
        return kl_estimate(policy, jnp.zeros(()), "k3")

    value, gradient = jax.value_and_grad(k3)(jnp.asarray(-gap))
    assert np.isfinite(value) and value > 1e8
    assert np.isfinite(gradient) and gradient < -1e8  # the way back up to the reference, which a clamp would lose


def test_no_gradient_to_the_reference_and_float32_from_bf16():
    policy, ref = jnp.full((3,), -1.0, jnp.bfloat16), jnp.full((3,), -2.0, jnp.bfloat16)
    for estimator in FORMULAS:
        assert kl_estimate(policy, ref, estimator).dtype == jnp.float32
        gradient = jax.grad(lambda ref, k=estimator: kl_estimate(policy, ref, k).sum())(ref)
        np.testing.assert_array_equal(gradient, jnp.zeros(3))


def test_unknown_estimator():
    with pytest.raises(ValueError, match="estimator: got 'k4', expected one of k1, k2, k3"):
        kl_estimate(jnp.zeros(1), jnp.zeros(1), "k4")
