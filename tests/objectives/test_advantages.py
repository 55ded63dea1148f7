"""Critic-free advantages against explicit loops; exact zeros; refusals."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.advantages import (
    frac_reward_zero_std,
    group_advantages,
    process_advantages,
    reinforce_pp_advantages,
    reinforce_pp_baseline_advantages,
)
from tests.objectives.cases import fill, random_mask

GROUPINGS = [(3, 7), (1, 2)]  # prompts, group size
jit_advantages = functools.partial(jax.jit, static_argnames=("group_size", "baseline", "normalization", "ddof"))(
    group_advantages
)


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


def test_frac_reward_zero_std():
    rewards = jnp.array([0.1, 0.1, 0.1, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 5.0, 4.0, 5.0])
    assert float(frac_reward_zero_std(rewards, 3)) == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "group_size: got 1, expected >= 2 because"),
        ({"group_size": 4}, "rewards: got 6, expected a multiple of group_size = 4"),
        ({"group_size": 2, "ddof": 2}, "ddof: got 2, expected 0 <= ddof < group_size = 2"),
        ({"group_size": 2, "baseline": "median"}, "baseline: got 'median', expected one of mean, leave_one_out"),
        ({"group_size": 2, "normalization": "max"}, "normalization: got 'max', expected one of group, batch, none"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(jnp.zeros(6), **options)


def test_group_of_one_is_refused():
    with pytest.raises(ValueError, match="group_size: got 1"):
        frac_reward_zero_std(jnp.zeros(3), 1)


def loop_whiten(values, mask, weights):
    tokens = [(values[b, t], weights[b]) for b, t in zip(*np.nonzero(mask), strict=True) if weights[b]]
    count = sum(w for _, w in tokens)
    mean = sum(x * w for x, w in tokens) / max(count, 1e-8)
    variance = sum(w * (x - mean) ** 2 for x, w in tokens) / max(count, 1e-8)
    counted = mask & (weights > 0)[:, None]
    return np.where(counted, (values - mean) / np.sqrt(variance + 1e-8), 0.0)


TOKEN_SHAPES = [(6, 5), (4, 1), (2, 3)]  # rows, slots; groups of two


def random_tokens(seed):
    rng = np.random.default_rng(seed)
    shape = TOKEN_SHAPES[seed % len(TOKEN_SHAPES)]
    return rng, random_mask(rng, *shape)


@pytest.mark.parametrize(("gamma", "kl_coef"), [(1.0, 0.0), (1.0, 0.1), (0.9, 0.5)])
def test_reinforce_pp_golden(gamma, kl_coef):
    call = jax.jit(reinforce_pp_advantages)
    for seed in range(52):
        rng, mask = random_tokens(seed)
        rewards = (rng.normal(size=len(mask)) + 0.01 * np.arange(len(mask))).astype(np.float32)
        kl = rng.normal(size=mask.shape).astype(np.float32)
        weights = rng.choice([0.0, 1.0, 1.0, 2.0], len(mask)).astype(np.float32)
        to_go = np.zeros(mask.shape)
        for b, row in enumerate(mask):
            slots = np.flatnonzero(row)
            for i, t in enumerate(slots):
                paid = [-kl_coef * float(kl[b, u]) + (float(rewards[b]) if u == slots[-1] else 0.0) for u in slots[i:]]
                to_go[b, t] = sum(gamma**k * r for k, r in enumerate(paid))
        got = call(
            rewards=rewards,
            completion_mask=mask,
            kl_penalty=fill(kl, mask),
            kl_coef=kl_coef,
            gamma=gamma,
            weights=weights,
        )
        counted = to_go[mask & (weights > 0)[:, None]]
        if len(counted) == 0 or counted.std() < 1e-3:  # nothing to compare with but float32 rounding
            assert np.all(np.isfinite(got))
            continue
        expected = loop_whiten(to_go, mask, weights)
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5, err_msg=f"seed {seed}")
        np.testing.assert_array_equal(np.asarray(got)[~mask], 0.0)


def test_reinforce_pp_baseline_golden():
    call = jax.jit(reinforce_pp_baseline_advantages, static_argnames="group_size")
    for seed in range(52):
        rng, mask = random_tokens(seed)
        rewards = rng.integers(3, size=len(mask)).astype(np.float32)
        if seed % 4 == 0:
            rewards = np.repeat(rng.normal(size=len(mask) // 2), 2).astype(np.float32)
        weights = rng.choice([0.0, 1.0, 2.0], len(mask)).astype(np.float32)
        groups = [(float(a), float(b)) for a, b in rewards.reshape(-1, 2)]
        centered = [reward - sum(group) / 2 for group in groups for reward in group]
        expected = loop_whiten(np.tile(np.array(centered)[:, None], mask.shape[1]), mask, weights)
        got = call(rewards=rewards, group_size=2, completion_mask=mask, weights=weights)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}")
        if seed % 4 == 0:
            np.testing.assert_array_equal(got, np.zeros(mask.shape))


def test_reinforce_pp_of_equal_rewards_is_exactly_zero():
    mask = np.arange(4) < np.array([4, 1, 2])[:, None]
    got = reinforce_pp_advantages(rewards=jnp.full(3, 0.1), completion_mask=mask)
    np.testing.assert_array_equal(got, jnp.zeros((3, 4)))


@pytest.mark.parametrize("ddof", [0, 1])
def test_process_advantages_golden(ddof):
    call = jax.jit(process_advantages, static_argnames=("group_size", "ddof"))
    for seed in range(52):
        rng, mask = random_tokens(seed)
        ends = rng.random(mask.shape) < 0.5
        rewards = rng.normal(size=mask.shape).astype(np.float32)
        if seed % 4 == 0:
            rewards[:] = 0.1
        expected = np.zeros(mask.shape)
        for start in range(0, len(mask), 2):
            rows = (start, start + 1)
            steps = [float(rewards[b, t]) for b in rows for t in np.flatnonzero(mask[b] & ends[b])]
            if len(set(steps)) < 2:
                continue  # nothing to compare a step with
            mean, std = sum(steps) / len(steps), loop_std(steps, ddof)
            for b in rows:
                for t in np.flatnonzero(mask[b]):
                    later = [u for u in range(t, mask.shape[1]) if mask[b, u] and ends[b, u]]
                    expected[b, t] = sum((float(rewards[b, u]) - mean) / (std + 1e-4) for u in later)
        got = call(
            step_rewards=fill(rewards, mask & ends), step_mask=ends, completion_mask=mask, group_size=2, ddof=ddof
        )
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}")
        np.testing.assert_array_equal(np.asarray(got)[~mask], 0.0)
        if seed % 4 == 0:
            np.testing.assert_array_equal(got, np.zeros(mask.shape))


@pytest.mark.parametrize("group_size", [3, 7])
def test_equal_step_rewards_give_exactly_zero(group_size):
    mask = np.ones((2 * group_size, 5), bool)
    for value in (0.1, 1 / 3, -0.7, 1e6 + 0.1):
        got = process_advantages(
            step_rewards=jnp.full(mask.shape, value), step_mask=mask, completion_mask=mask, group_size=group_size
        )
        np.testing.assert_array_equal(got, np.zeros(mask.shape))


def test_one_step_per_completion_is_outcome_supervision():
    """With the only step ending on the last token, process supervision is `group_advantages`."""
    rewards = jnp.array([0.0, 1.0, 1.0, 0.5, 0.2, 0.3])
    mask = np.arange(4) < np.array([4, 1, 2, 3, 4, 2])[:, None]
    ends = mask & ~np.pad(mask[:, 1:], [(0, 0), (0, 1)])
    got = process_advantages(
        step_rewards=jnp.where(ends, rewards[:, None], 0.0), step_mask=ends, completion_mask=mask, group_size=3
    )
    expected = jnp.where(mask, group_advantages(rewards, 3)[:, None], 0.0)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_token_advantages_pass_no_gradient():
    mask, ends = jnp.ones((4, 3), bool), jnp.array([[False, True, True]] * 4)

    def total(rewards, steps):
        plain = reinforce_pp_advantages(rewards=rewards, completion_mask=mask, kl_penalty=steps, kl_coef=0.1)
        baseline = reinforce_pp_baseline_advantages(rewards=rewards, group_size=2, completion_mask=mask)
        process = process_advantages(step_rewards=steps, step_mask=ends, completion_mask=mask, group_size=2)
        return jnp.sum(plain**3 + baseline**3 + process**3)

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(jnp.arange(4.0), jnp.arange(12.0).reshape(4, 3))
    assert not any(np.any(gradient) for gradient in gradients)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "group_size: got 1, expected >= 2"),
        ({"group_size": 4}, "rewards: got 6, expected a multiple of group_size = 4"),
        ({"group_size": 2, "ddof": 2}, "ddof: got 2, expected 0 or 1"),
    ],
)
def test_process_refusals(options, message):
    mask = jnp.ones((6, 2), bool)
    with pytest.raises(ValueError, match=message):
        process_advantages(step_rewards=jnp.zeros((6, 2)), step_mask=mask, completion_mask=mask, **options)


def test_reinforce_pp_refusals():
    mask = jnp.ones((3, 2), bool)
    with pytest.raises(ValueError, match="kl_coef: given.*because kl_penalty is None"):
        reinforce_pp_advantages(rewards=jnp.zeros(3), completion_mask=mask, kl_coef=0.1)
    with pytest.raises(ValueError, match="rewards: got 3, expected a multiple of group_size = 2"):
        reinforce_pp_baseline_advantages(rewards=jnp.zeros(3), group_size=2, completion_mask=mask)


def test_by_default_a_ten_thousandth_is_added_to_the_std_and_nothing_is_discounted():
    rewards = jnp.array([0.0, 2e-4])
    expected = 1e-4 / (math.sqrt(2) * 1e-4 + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards, 2), [-expected, expected], rtol=1e-5)
    ones = jnp.ones((2, 1), bool)
    steps = process_advantages(step_rewards=rewards[:, None], step_mask=ones, completion_mask=ones, group_size=2)
    np.testing.assert_allclose(steps[:, 0], [-expected, expected], rtol=1e-5)
    tokens = reinforce_pp_advantages(rewards=rewards, completion_mask=jnp.ones((2, 3), bool))
    np.testing.assert_array_equal(tokens, tokens[:, :1] * jnp.ones((1, 3)))
    assert tokens[0, 0] < tokens[1, 0]
