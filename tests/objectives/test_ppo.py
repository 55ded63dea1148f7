"""PPO against explicit loops: policy loss, dual clip, value loss and the adaptive KL coefficient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.gae import explained_variance
from objectives.ppo import adaptive_kl_coef, ppo_policy_loss, ppo_value_loss
from objectives.reduce import reduce_metrics
from objectives.surrogate import clipped_surrogate
from tests.objectives.cases import SEEDS, SHAPES, fill, random_logps, random_mask

jit_policy_loss = functools.partial(jax.jit, static_argnames="kl_estimator")(ppo_policy_loss)
jit_value_loss = jax.jit(ppo_value_loss)


def random_case(seed):
    rng = np.random.default_rng(seed)
    shape = SHAPES[seed % len(SHAPES)]
    mask = random_mask(rng, *shape)
    old = random_logps(rng, *shape)
    policy, ref = (old + rng.normal(scale=0.8, size=shape).astype(np.float32) for _ in range(2))
    advantages = rng.choice([-1.5, -0.2, 0.0, 0.3, 2.0], shape).astype(np.float32)
    entropy = rng.exponential(1.0, shape).astype(np.float32)
    arrays = {"policy_logps": policy, "old_logps": old, "advantages": advantages, "ref_logps": ref}
    return arrays | {"entropy": entropy}, mask


def loop_token(policy, old, advantage, ref, entropy, low, high, dual, entropy_coef, kl_coef, kl_estimator):
    """One token of the loss and which bounds were active, as the papers write them."""
    ratio = np.exp(policy - old)
    objective = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    bounded = dual is not None and advantage < 0 and objective < dual * advantage
    if dual is not None and advantage < 0:
        objective = max(objective, dual * advantage)
    d = policy - ref
    k3 = np.exp(-d) - 1 + d
    penalty = k3 if kl_estimator == "k3" else d * d / 2
    out = {
        "losses": -objective - entropy_coef * entropy + kl_coef * penalty,
        "log_ratio": policy - old,
        "ratio": ratio,
        "approx_kl": ratio - 1 - (policy - old),
        "clip_fraction_low": advantage < 0 and ratio < 1 - low,
        "clip_fraction_high": advantage > 0 and ratio > 1 + high,
        "entropy": entropy,
        "kl_ref": k3,
    }
    out["clip_fraction"] = out["clip_fraction_low"] or out["clip_fraction_high"] or bounded
    return out | ({} if dual is None else {"clip_fraction_dual": bounded})


@pytest.mark.parametrize(
    ("dual_clip", "kl_estimator", "entropy_coef", "kl_coef"),
    [(None, "k3", 0.0, 0.0), (2.0, "k3", 0.01, 0.05), (1.4, "k2", 0.5, 1.0)],
)
def test_policy_golden(dual_clip, kl_estimator, entropy_coef, kl_coef):
    for seed in SEEDS:
        arrays, mask = random_case(seed)
        got = jit_policy_loss(
            **{name: fill(x, mask) for name, x in arrays.items()},
            completion_mask=mask,
            clip_eps_low=0.2,
            clip_eps_high=0.28,
            dual_clip=dual_clip,
            entropy_coef=entropy_coef,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
        )
        got = jax.device_get({"losses": got.losses, **got.metrics})
        for b, t in np.ndindex(mask.shape):
            if not mask[b, t]:
                assert float(got["losses"][b, t]) == 0.0
                continue
            token = [float(x[b, t]) for x in arrays.values()]
            expected = loop_token(*token, 0.2, 0.28, dual_clip, entropy_coef, kl_coef, kl_estimator)
            assert set(got) == set(expected)
            for name, value in expected.items():
                message = f"{name}, seed {seed}"
                np.testing.assert_allclose(got[name][b, t], float(value), rtol=1e-5, atol=1e-5, err_msg=message)


@pytest.mark.parametrize(
    ("advantage", "ratio", "effective_ratio", "active"),
    [
        (2.0, 4.0, 1.3, "high"),  # a good token: the dual bound is not for it
        (2.0, 0.5, 0.5, None),
        (-2.0, 0.5, 0.8, "low"),
        (-2.0, 1.5, 1.5, None),  # a bad token grew: pushed down, up to the bound
        (-2.0, 2.9, 2.9, None),
        (-2.0, 4.0, 3.0, "dual"),
        (0.0, 4.0, 0.0, None),
    ],
)
def test_sign_table_of_the_dual_clip(advantage, ratio, effective_ratio, active):
    def loss(log_ratio):
        return clipped_surrogate(
            ratio=jnp.exp(log_ratio),
            advantages=jnp.array(advantage),
            clip_eps_low=0.2,
            clip_eps_high=0.3,
            dual_clip=3.0,
        )

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.log(ratio))
    np.testing.assert_allclose(value, -effective_ratio * advantage, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient, 0.0 if active else -ratio * advantage, rtol=1e-5, atol=1e-7)
    flags = {name.removeprefix("clip_fraction").removeprefix("_") for name, flag in metrics.items() if flag}
    assert flags == ({active, ""} if active else set())


def test_on_policy_gradient_is_reinforce():
    logps = jnp.array([[-0.5, -2.0, -0.1]])
    advantages, mask = jnp.array([[1.5, -0.5, 9.0]]), jnp.array([[True, True, False]])

    def loss(policy):
        arrays = {"policy_logps": policy, "old_logps": logps, "advantages": advantages}
        return ppo_policy_loss(**arrays, completion_mask=mask).losses.sum()

    np.testing.assert_allclose(jax.grad(loss)(logps), jnp.where(mask, -advantages, 0.0), rtol=1e-6)


def test_entropy_bonus_raises_entropy_and_kl_pulls_to_the_reference():
    zeros, mask = jnp.zeros((1, 1)), jnp.ones((1, 1), bool)

    def loss(policy, entropy):
        arrays = {"policy_logps": policy, "old_logps": zeros, "advantages": zeros, "completion_mask": mask}
        out = ppo_policy_loss(
            **arrays, entropy=entropy, entropy_coef=0.5, ref_logps=zeros - 1.0, kl_coef=2.0, kl_estimator="k2"
        )
        return out.losses.sum()

    to_policy, to_entropy = jax.grad(loss, argnums=(0, 1))(zeros, zeros + 3.0)
    np.testing.assert_allclose(to_entropy, [[-0.5]])
    np.testing.assert_allclose(to_policy, [[2.0]])  # above the reference: descent lowers it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_estimator": "k1"}, "kl_estimator: got 'k1'.*expected gradient is zero"),
        ({"kl_coef": 0.1}, "kl_coef: given, but it would have no effect because ref_logps is None"),
        ({"entropy_coef": 0.1}, "entropy_coef: given, but it would have no effect because entropy is None"),
        ({"dual_clip": 1.2}, "dual_clip: got 1.2, expected above 1 \\+ clip_eps_high = 1.2"),
    ],
)
def test_policy_refusals(options, message):
    zeros = jnp.zeros((1, 1))
    arrays = {"policy_logps": zeros, "old_logps": zeros, "advantages": zeros}
    with pytest.raises(ValueError, match=message):
        ppo_policy_loss(**arrays, completion_mask=zeros == 0, **options)


@pytest.mark.parametrize("clip", [None, 0.2, 1.0])
def test_value_golden(clip):
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        shape = SHAPES[seed % len(SHAPES)]
        mask = random_mask(rng, *shape)
        old, values, returns = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
        got = jit_value_loss(
            values=fill(values, mask),
            old_values=None if clip is None else fill(old, mask),
            returns=fill(returns, mask),
            completion_mask=mask,
            clip_eps_value=clip,
        )
        expected = {name: np.zeros(shape) for name in ["losses", *got.metrics]}
        for b, t in zip(*np.nonzero(mask), strict=True):
            v, v_old, r = float(values[b, t]), float(old[b, t]), float(returns[b, t])
            bounded = v if clip is None else min(max(v, v_old - clip), v_old + clip)
            expected["losses"][b, t] = 0.5 * max((v - r) ** 2, (bounded - r) ** 2)
            expected["value_clip_fraction"][b, t] = (bounded - r) ** 2 > (v - r) ** 2
            expected["values"][b, t], expected["returns"][b, t] = v, r
            expected["returns_squared"][b, t] = r * r
            expected["value_error"][b, t], expected["value_error_squared"][b, t] = r - v, (r - v) ** 2
        for name, array in {"losses": got.losses, **got.metrics}.items():
            np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-5, err_msg=f"{name}, {seed}")


@pytest.mark.parametrize(
    ("value", "target", "gradient"),
    [
        (1.2, 3.0, 1.2 - 3.0),  # inside the clip range
        (1.2, 0.0, 1.2),
        (2.0, 3.0, 0.0),  # moved far towards the target: the clip stops it
        (2.0, 0.0, 2.0),  # moved far away from the target: pulled back
        (0.0, -3.0, 0.0),
        (0.0, 3.0, -3.0),
        (1.5, 3.0, 1.5 - 3.0),  # at the bound: the unclipped side's
    ],
)
def test_sign_table_of_the_value_clip(value, target, gradient):
    """Old value 1, clip 0.5."""

    def loss(value):
        arrays = {"values": value, "old_values": jnp.ones((1, 1)), "returns": jnp.full((1, 1), target)}
        mask = jnp.ones((1, 1), bool)
        return ppo_value_loss(**arrays, completion_mask=mask, clip_eps_value=0.5).losses.sum()

    np.testing.assert_allclose(jax.grad(loss)(jnp.full((1, 1), value)), [[gradient]], rtol=1e-6)


@pytest.mark.parametrize(
    ("old", "clip", "message"),
    [
        (None, 0.2, "clip_eps_value: given, but.*old_values is None"),
        (jnp.zeros((1, 1)), None, "old_values: given, but.*clip_eps_value is None"),
    ],
)
def test_value_refusals(old, clip, message):
    zeros = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match=message):
        ppo_value_loss(values=zeros, returns=zeros, completion_mask=zeros == 0, old_values=old, clip_eps_value=clip)


def test_explained_variance_of_micro_batches_is_that_of_the_batch():
    rng = np.random.default_rng(0)
    returns = rng.normal(loc=3.0, size=(6, 5)).astype(np.float32)
    values = returns + rng.normal(scale=0.5, size=(6, 5)).astype(np.float32)
    mask = np.arange(5) < np.array([5, 1, 3, 2, 4, 5])[:, None]
    sums = []
    for rows in (slice(0, 2), slice(2, 6)):
        arrays = {"values": values[rows], "returns": returns[rows], "completion_mask": mask[rows]}
        out = ppo_value_loss(**arrays, old_values=None, clip_eps_value=None)
        sums.append(reduce_metrics(out.metrics, mask=mask[rows]))
    means = {name: (sums[0][name] + sums[1][name]).mean() for name in sums[0]}
    names = ("returns", "returns_squared", "value_error", "value_error_squared")
    got = explained_variance(**{name: means[name] for name in names})
    expected = 1 - (returns - values)[mask].var() / returns[mask].var()
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_adaptive_kl_coefficient_moves_towards_the_target_and_no_faster_than_its_clip():
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        coef, observed, target = rng.uniform(0.01, 20.0, 3)
        batch, horizon = int(rng.integers(1, 64)), float(rng.integers(100, 10000))
        error = min(max((observed - target) / target, -0.2), 0.2)
        got = adaptive_kl_coef(kl_coef=coef, observed_kl=observed, target_kl=target, horizon=horizon, batch_size=batch)
        np.testing.assert_allclose(got, coef * (1 + error * batch / horizon), rtol=1e-5)
    scalars = {"kl_coef": 0.5, "target_kl": 6.0, "horizon": 100.0, "batch_size": 10}
    after = [float(adaptive_kl_coef(observed_kl=kl, **scalars)) for kl in (60.0, 8.0, 6.5, 6.0, 5.5, 0.0)]
    assert after[0] == after[1] > after[2] > after[3] == 0.5 > after[4] > after[5]


def test_the_default_clip_is_a_fifth_on_either_side():
    logps, advantages = jnp.log(jnp.array([[1.5, 0.5]])), jnp.array([[1.0, -1.0]])
    mask = jnp.ones((1, 2), bool)
    output = ppo_policy_loss(policy_logps=logps, old_logps=0 * logps, advantages=advantages, completion_mask=mask)
    np.testing.assert_allclose(output.losses, [[-1.2, 0.8]], rtol=1e-6)


def test_the_adaptive_coefficient_passes_no_gradient():
    def coefficient(observed):
        return adaptive_kl_coef(kl_coef=0.1, observed_kl=observed, target_kl=6.0, horizon=100.0, batch_size=10.0)

    assert float(jax.grad(coefficient)(6.1)) == 0.0  # inside the clip, where it would have one


def test_a_dual_clip_is_compared_with_the_upper_bound():
    ones = jnp.ones((1, 2))
    options = {"clip_eps_low": 0.2, "clip_eps_high": 0.28, "dual_clip": 1.25}
    with pytest.raises(ValueError, match=r"^dual_clip: got 1.25, expected above 1 \+ clip_eps_high = 1.28"):
        clipped_surrogate(ratio=ones, advantages=ones, **options)
