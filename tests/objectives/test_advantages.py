"""Group-relative advantages against explicit loops; exact zeros; refusals."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.advantages import frac_reward_zero_std, group_advantages, zero_std_groups

GROUPINGS = [(3, 7), (1, 2)]  # prompts, group size
jit_advantages = functools.partial(
    jax.jit, static_argnames=("group_size", "baseline", "normalization", "ddof")
)(group_advantages)


def loop_std(values, ddof):
    mean = sum(values) / len(values)
    return (sum((v - mean) ** 2 for v in values) / (len(values) - ddof)) ** 0.5


def loop_advantages(rewards, group_size, baseline, normalization, ddof, eps):
    rewards, advantages = [float(r) for r in rewards], []
    for i, reward in enumerate(rewards):
        start = i // group_size * group_size
        group = rewards[start : start + group_size]
        others = [r for j, r in enumerate(group) if start + j != i]
        compared = others if baseline == "leave_one_out" else group
        advantage = reward - sum(compared) / len(compared)
        if normalization != "none":
            advantage /= loop_std(group if normalization == "group" else rewards, ddof) + eps
        advantages.append(advantage)
    return advantages


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("normalization", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_golden(baseline, normalization, ddof):
    for seed in range(52):
        rng = np.random.default_rng(seed)
        prompts, group_size = GROUPINGS[seed % len(GROUPINGS)]
        rewards = [
            rng.normal(size=prompts * group_size),
            rng.integers(2, size=prompts * group_size),  # verifier rewards, often all equal
            np.repeat(rng.normal(size=prompts), group_size),
        ][seed % 3].astype(np.float32)
        options = {"baseline": baseline, "normalization": normalization, "ddof": ddof}
        got = jit_advantages(rewards, group_size, **options, eps=1e-4)
        # float64 rounding of equal rewards over eps is the oracle's only error; far below the tolerance
        expected = loop_advantages(rewards, group_size, **options, eps=1e-4)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}")


@pytest.mark.parametrize("eps", [1e-4, 0.0])
@pytest.mark.parametrize("normalization", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_zero(normalization, eps):
    calls = [(group_advantages, 3), (jit_advantages, 3), (jit_advantages, 7), (jit_advantages, 16)]
    for value, (call, group_size) in itertools.product([0.1, 1 / 3, -0.7, 1e6 + 0.1], calls):
        rewards = np.full(2 * group_size, value, np.float32)
        got = call(jnp.asarray(rewards), group_size, normalization=normalization, eps=eps)
        np.testing.assert_array_equal(got, np.zeros(2 * group_size))


def test_equal_group_stays_zero_beside_a_group_that_learns():
    advantages = group_advantages(jnp.array([0.1, 0.1, 0.1, 0.0, 1.0, 0.0]), 3, normalization="batch")
    np.testing.assert_array_equal(advantages[:3], jnp.zeros(3))
    assert np.all(np.asarray(advantages[3:]) != 0)


def test_bf16_rewards_and_no_gradient():
    rewards = jnp.array([0.0, 1.0, 1.0, 0.0], jnp.bfloat16)
    assert group_advantages(rewards, 2).dtype == jnp.float32
    gradient = jax.grad(lambda r: jnp.sum(group_advantages(r, 2) ** 2))(jnp.array([0.0, 1.0, 3.0, 0.0]))
    np.testing.assert_array_equal(gradient, jnp.zeros(4))


def test_zero_std_groups():
    rewards = jnp.array([0.1, 0.1, 0.1, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 5.0, 4.0, 5.0])
    np.testing.assert_array_equal(zero_std_groups(rewards, 3), [True, False, True, False])
    assert float(frac_reward_zero_std(rewards, 3)) == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "group_size: got 1, expected >= 2 because"),
        ({"group_size": 4}, "rewards: got 6, expected a multiple of group_size = 4"),
        ({"group_size": 2, "ddof": 2}, "ddof: got 2, expected 0 <= ddof < group_size = 2"),
        (
            {"group_size": 2, "baseline": "median"},
            "baseline: got 'median', expected one of mean, leave_one_out",
        ),
        (
            {"group_size": 2, "normalization": "max"},
            "normalization: got 'max', expected one of group, batch, none",
        ),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(jnp.zeros(6), **options)


@pytest.mark.parametrize("function", [zero_std_groups, frac_reward_zero_std])
def test_group_of_one_is_refused_everywhere(function):
    with pytest.raises(ValueError, match="group_size: got 1"):
        function(jnp.zeros(3), 1)
