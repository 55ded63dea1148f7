"""GAE against explicit loops and its limits; where rewards are paid; whitening over the global batch."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.gae import explained_variance, gae, last_token, token_rewards, whiten
from objectives.ppo import ppo_policy_loss
from objectives.reduce import token_mean
from tests.objectives.cases import SEEDS, SHAPES, fill, random_mask

jit_gae = jax.jit(gae)
jit_rewards = jax.jit(token_rewards)
jit_whiten = jax.jit(whiten)
jit_last_token = jax.jit(last_token)


def random_case(seed):
    rng = np.random.default_rng(seed)
    shape = SHAPES[seed % len(SHAPES)]
    mask = random_mask(rng, *shape)
    rewards, values, kl = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
    if seed % 5 == 0:
        rewards[:], values[:] = 0.1, 0.1  # all equal
    return rewards, values, kl, mask, rng


def loop_gae(rewards, values, gamma, lam):
    """The double sum of the paper's Eq. 16 on one row of completion tokens, without its recursion."""
    length = len(rewards)
    after = [*values[1:], 0.0]
    errors = [rewards[t] + gamma * after[t] - values[t] for t in range(length)]
    return [sum((gamma * lam) ** (u - t) * errors[u] for u in range(t, length)) for t in range(length)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 0.0), (0.99, 1.0), (0.0, 0.5)])
def test_golden(gamma, lam):
    for seed in SEEDS:
        rewards, values, _, mask, _ = random_case(seed)
        got = jit_gae(
            rewards=fill(rewards, mask), values=fill(values, mask), completion_mask=mask, gamma=gamma, gae_lambda=lam
        )
        advantages = np.zeros(mask.shape)
        for b, row in enumerate(mask):
            slots = np.flatnonzero(row)  # holes are skipped
            tokens = [rewards[b, slots].astype(float), values[b, slots].astype(float)]
            advantages[b, slots] = loop_gae(*tokens, gamma, lam)
        returns = np.where(mask, advantages + values, 0.0)
        for name, g, e in zip(("advantages", "returns"), got, (advantages, returns), strict=True):
            assert g.dtype == jnp.float32
            np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-5, err_msg=f"{name}, seed {seed}")
            np.testing.assert_array_equal(np.asarray(g)[~mask], 0.0)


def test_lambda_zero_is_the_one_step_error_and_lambda_one_the_return():
    rewards, values = jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[0.5, -1.0, 3.0]])
    arrays = {"rewards": rewards, "values": values, "completion_mask": jnp.ones((1, 3), bool)}
    one_step, _ = gae(**arrays, gamma=0.5, gae_lambda=0.0)
    np.testing.assert_allclose(one_step, [[1 - 0.5 - 0.5, 2 + 1.5 + 1, 4 - 3]])
    advantages, returns = gae(**arrays, gamma=0.5, gae_lambda=1.0)
    np.testing.assert_allclose(returns, [[1 + 1 + 1, 2 + 2, 4]])
    np.testing.assert_allclose(advantages, returns - values)


def test_what_follows_the_eos_never_matters_and_neither_does_the_start_slot():
    rewards, values = np.array([[1.0, -2.0, 3.0]], np.float32), np.array([[0.5, 1.5, -1.0]], np.float32)
    mask = np.ones((1, 3), bool)
    scalars = {"gamma": 0.9, "gae_lambda": 0.7}
    expected = jit_gae(rewards=rewards, values=values, completion_mask=mask, **scalars)
    for left, right in [(0, 4), (2, 2), (4, 0)]:
        widths = [(0, 0), (left, right)]
        padded = {
            "rewards": np.pad(rewards, widths, constant_values=7.0),
            "values": np.pad(values, widths, constant_values=-50.0),
            "completion_mask": np.pad(mask, widths),
        }
        for got, array in zip(jit_gae(**padded, **scalars), expected, strict=True):
            np.testing.assert_array_equal(got[:, left : left + 3], array)
            np.testing.assert_array_equal(got, np.pad(array, widths))


def test_no_gradient_passes():
    def total(rewards, values):
        mask = jnp.ones((2, 3), bool)
        paid = token_rewards(scores=rewards[:, 0], completion_mask=mask, kl_penalty=values, kl_coef=0.1)
        advantages, returns = gae(
            rewards=paid + rewards, values=values, completion_mask=mask, gamma=0.9, gae_lambda=0.9
        )
        return jnp.sum(whiten(values=advantages, mask=mask) ** 3 + returns + paid)

    for gradient in jax.grad(total, argnums=(0, 1))(jnp.ones((2, 3)), jnp.arange(6.0).reshape(2, 3)):
        np.testing.assert_array_equal(gradient, jnp.zeros((2, 3)))


def test_score_is_paid_on_the_last_completion_token_and_kl_on_each():
    for seed in SEEDS:
        steps, _, kl, mask, rng = random_case(seed)
        scores = rng.normal(size=len(mask)).astype(np.float32)
        expected, last = np.zeros(mask.shape), np.zeros(mask.shape, bool)
        for b, row in enumerate(mask):
            slots = np.flatnonzero(row)
            for t in slots:
                expected[b, t] = -0.3 * kl[b, t] + steps[b, t]
            if len(slots):
                expected[b, slots[-1]] += scores[b]
                last[b, slots[-1]] = True
        got = jit_rewards(
            scores=scores, completion_mask=mask, kl_penalty=fill(kl, mask), kl_coef=0.3, step_rewards=fill(steps, mask)
        )
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}")
        np.testing.assert_array_equal(jit_last_token(mask), last)
        plain = jit_rewards(scores=scores, completion_mask=mask)
        np.testing.assert_array_equal(plain, np.where(last, scores[:, None], 0.0))


def test_kl_coefficient_without_a_penalty_is_refused():
    with pytest.raises(ValueError, match="kl_coef: given.*because kl_penalty is None"):
        token_rewards(scores=jnp.ones(1), completion_mask=jnp.ones((1, 2), bool), kl_coef=0.1)


def test_whitening_is_that_of_all_unmasked_tokens():
    for seed in SEEDS:
        values, _, _, mask, rng = random_case(seed)
        weights = rng.choice([0.0, 0.5, 1.0, 2.0], len(mask)).astype(np.float32)
        for row_weights in (None, weights):
            tokens = [
                (float(values[b, t]), 1.0 if row_weights is None else float(weights[b]))
                for b, t in zip(*np.nonzero(mask), strict=True)
            ]
            count = sum(w for _, w in tokens)
            mean = sum(w * x for x, w in tokens) / count if count else 0.0
            variance = sum(w * (x - mean) ** 2 for x, w in tokens) / count if count else 0.0
            got = jit_whiten(values=fill(values, mask), mask=mask, weights=row_weights)
            np.testing.assert_array_equal(np.asarray(got)[~mask], 0.0)
            counted = mask if row_weights is None else mask & (weights > 0)[:, None]
            expected = (values - mean) / np.sqrt(variance + 1e-8)
            if len({x for x, w in tokens if w}) <= 1:  # else the loop's rounding is blown up by a std of 0
                expected = np.zeros(mask.shape)
            got, expected = np.asarray(got)[counted], expected[counted]
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}")


def test_equal_values_whiten_to_exactly_zero():
    for value, shape in itertools.product([0.1, 1 / 3, -0.7, 1e6 + 0.1], [(3, 7), (1, 1), (5, 16)]):
        values, mask = jnp.full(shape, value), jnp.ones(shape, bool).at[0, 1:].set(False)
        np.testing.assert_array_equal(jit_whiten(values=values, mask=mask), jnp.zeros(shape))


def test_rows_of_weight_zero_and_padding_do_not_move_the_statistics():
    values = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    mask = np.arange(5) < np.array([5, 1, 3, 2])[:, None]
    expected = whiten(values=values, mask=mask)
    more = np.concatenate([values, np.array([[1e3] * 5, [np.nan] * 5], np.float32)])
    more_mask = np.concatenate([mask, np.ones((2, 5), bool)])
    got = whiten(values=more, mask=more_mask, weights=np.array([1, 1, 1, 1, 0, 0], np.float32))
    np.testing.assert_allclose(got[:4], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(got[4:], jnp.zeros((2, 5)))


def test_micro_batches_of_globally_whitened_advantages_are_one_batch():
    """And whitening each micro-batch by itself is another loss, which this test would see."""
    rng = np.random.default_rng(1)
    mask = np.arange(5) < np.array([5, 1, 3, 2])[:, None]
    advantages, policy, old = (rng.normal(size=(4, 5)).astype(np.float32) for _ in range(3))

    def loss(advantages, rows):
        arrays = {"policy_logps": policy[rows], "old_logps": old[rows], "completion_mask": mask[rows]}
        return token_mean(ppo_policy_loss(**arrays, advantages=advantages).losses, mask[rows])

    halves = [slice(0, 2), slice(2, 4)]
    whole = whiten(values=advantages, mask=mask)
    expected = loss(whole, slice(0, 4)).mean()
    first, second = (loss(whole[half], half) for half in halves)
    np.testing.assert_allclose((first + second).mean(), expected, rtol=1e-5)
    apart = [loss(whiten(values=advantages[h], mask=mask[h]), h) for h in halves]
    assert abs(float((apart[0] + apart[1]).mean()) - float(expected)) > 1e-2


def test_explained_variance_from_means():
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        returns = rng.normal(loc=2.0, size=50)
        values = rng.uniform(-1, 2) * returns + rng.normal(size=50)
        errors = returns - values
        got = explained_variance(
            returns=returns.mean(),
            returns_squared=(returns**2).mean(),
            value_error=errors.mean(),
            value_error_squared=(errors**2).mean(),
        )
        np.testing.assert_allclose(got, 1 - errors.var() / returns.var(), rtol=1e-4, atol=1e-4)


def test_explained_variance_where_returns_do_not_vary_is_zero():
    got = explained_variance(
        returns=jnp.array(0.1), returns_squared=jnp.array(0.1) ** 2, value_error=0.3, value_error_squared=0.5
    )
    assert float(got) == 0.0


def test_whitening_passes_no_gradient_and_adds_a_hundred_millionth_to_the_variance():
    values, mask = jnp.array([[0.0, 2e-4]]), jnp.ones((1, 2), bool)
    got = whiten(values=values, mask=mask)
    np.testing.assert_allclose(got, [[-math.sqrt(0.5), math.sqrt(0.5)]], rtol=1e-5)  # the variance is 1e-8
    gradient = jax.grad(lambda x: whiten(values=x, mask=mask)[0, 1])(values)
    np.testing.assert_array_equal(gradient, [[0.0, 0.0]])


def test_returns_vary_if_their_variance_is_a_millionth_of_their_square():
    for variance, expected in ((1.5e-6, 1.0), (0.5e-6, 0.0)):
        mean = math.sqrt(1.0 - variance)
        got = explained_variance(returns=mean, returns_squared=1.0, value_error=0.0, value_error_squared=0.0)
        assert float(got) == expected
