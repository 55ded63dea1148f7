"""GRPO against explicit loops, the sign table of its clip, its limits and its family."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.advantages import group_advantages
from objectives.grpo import grpo_loss
from objectives.reduce import reduce
from tests.objectives.cases import SEEDS, SHAPES, fill, random_logps, random_mask

jit_loss = functools.partial(jax.jit, static_argnames="kl_estimator")(grpo_loss)


def loop_grpo(policy, old, advantages, mask, low, high, ref, beta, kl_estimator):
    names = [
        "losses",
        "log_ratio",
        "ratio",
        "approx_kl",
        "clip_fraction_low",
        "clip_fraction_high",
        "clip_fraction",
        "kl_ref",
    ]
    out = {name: np.zeros(mask.shape) for name in names}
    for b, t in zip(*np.nonzero(mask), strict=True):
        ratio, a = np.exp(float(policy[b, t]) - float(old[b, t])), float(advantages[b])
        clipped = min(max(ratio, 1 - low), 1 + high)
        d = float(policy[b, t]) - float(ref[b, t])
        k3 = np.exp(-d) - 1 + d
        out["losses"][b, t] = -min(ratio * a, clipped * a) + beta * (k3 if kl_estimator == "k3" else d**2 / 2)
        out["ratio"][b, t] = ratio
        out["log_ratio"][b, t] = np.log(ratio)
        out["approx_kl"][b, t] = ratio - 1 - np.log(ratio)
        out["clip_fraction_low"][b, t] = ratio < 1 - low and a < 0
        out["clip_fraction_high"][b, t] = ratio > 1 + high and a > 0
        out["clip_fraction"][b, t] = clipped * a < ratio * a
        out["kl_ref"][b, t] = k3
    return out


def random_case(seed):
    rng = np.random.default_rng(seed)
    shape = SHAPES[seed % len(SHAPES)]
    mask = random_mask(rng, *shape)
    old = random_logps(rng, *shape)
    policy = old + rng.normal(scale=0.4, size=shape).astype(np.float32)
    ref = old + rng.normal(scale=0.4, size=shape).astype(np.float32)
    advantages = rng.choice([-1.5, -0.2, 0.0, 0.3, 2.0], shape[0]).astype(np.float32)
    return [fill(policy, mask), fill(old, mask), advantages, mask], fill(ref, mask)


@pytest.mark.parametrize("kl_estimator", ["k2", "k3"])
@pytest.mark.parametrize(("low", "high", "beta"), [(0.2, 0.2, 0.0), (0.2, 0.28, 0.04), (0.1, 0.5, 1.0)])
def test_golden(low, high, beta, kl_estimator):
    for seed in SEEDS:
        (policy, old, advantages, mask), ref = random_case(seed)
        expected = loop_grpo(policy, old, advantages, mask, low, high, ref, beta, kl_estimator)
        got = jit_loss(
            policy_logps=policy,
            old_logps=old,
            advantages=advantages,
            completion_mask=mask,
            clip_eps_low=low,
            clip_eps_high=high,
            ref_logps=ref,
            beta=beta,
            kl_estimator=kl_estimator,
        )
        assert {"losses", *got.metrics} == set(expected)
        for name, array in {"losses": got.losses, **got.metrics}.items():
            kept = np.where(mask, array, 0.0)
            np.testing.assert_allclose(kept, expected[name], rtol=1e-5, atol=1e-5, err_msg=f"{name}, seed {seed}")
        np.testing.assert_array_equal(np.asarray(got.losses)[~mask], 0.0)


def token_loss(policy, advantage, **options):
    arrays = {"old_logps": jnp.zeros((1, 1)), "completion_mask": jnp.ones((1, 1), bool)}
    output = grpo_loss(policy_logps=policy.reshape(1, 1), advantages=jnp.full(1, advantage), **arrays, **options)
    return output.losses[0, 0], output.metrics


@jax.jit
def token_gradient(policy, advantage, low, high):
    def loss(policy):
        return token_loss(policy, advantage, clip_eps_low=low, clip_eps_high=high)

    return jax.value_and_grad(loss, has_aux=True)(policy)


@pytest.mark.parametrize(
    ("advantage", "ratio", "effective_ratio", "clipped"),
    [
        (2.0, 0.5, 0.5, None),  # too rare a good token: push up
        (2.0, 1.0, 1.0, None),
        (2.0, 1.25, 1.25, None),  # inside clip-higher, outside the lower bound's mirror image
        (2.0, 1.5, 1.3, "clip_fraction_high"),  # good token already pushed up
        (-2.0, 0.5, 0.8, "clip_fraction_low"),  # bad token already pushed down
        (-2.0, 0.9, 0.9, None),
        (-2.0, 1.0, 1.0, None),
        (-2.0, 1.5, 1.5, None),  # too common a bad token: push down
        (0.0, 0.5, 0.0, None),
        (0.0, 1.5, 0.0, None),
    ],
)
def test_sign_table_of_the_clip(advantage, ratio, effective_ratio, clipped):
    (value, metrics), gradient = token_gradient(np.float32(np.log(ratio)), advantage, 0.2, 0.3)
    np.testing.assert_allclose(value, -effective_ratio * advantage, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient, 0.0 if clipped else -ratio * advantage, rtol=1e-5, atol=1e-7)
    active = {name for name in metrics if name.startswith("clip_fraction_") and metrics[name].any()}
    assert active == ({clipped} if clipped else set())
    assert bool(metrics["clip_fraction"].any()) == bool(clipped)


@pytest.mark.parametrize("clip_eps", [0.2, 0.0])
def test_on_policy_gradient_is_reinforce(clip_eps):
    """At ratio 1 the gradient is that of `-A log pi`, even with no room to clip in."""
    logits = jax.random.normal(jax.random.key(0), (3, 4, 5))
    tokens = jax.random.randint(jax.random.key(1), (3, 4, 1), 0, 5)
    mask = jnp.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]], bool)
    advantages = jnp.array([1.5, -0.5, 0.7])

    def logps(logits):
        return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens, axis=-1)[..., 0]

    def grpo(z):
        arrays = {"policy_logps": logps(z), "old_logps": logps(z), "completion_mask": mask}
        clip = {"clip_eps_low": clip_eps, "clip_eps_high": clip_eps}
        return grpo_loss(**arrays, **clip, advantages=advantages).losses.sum()

    def reinforce(z):
        return -jnp.sum(jnp.where(mask, advantages[:, None] * logps(z), 0.0))

    got, expected = jax.jit(lambda z: (jax.grad(grpo)(z), jax.grad(reinforce)(z)))(logits)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_equal_rewards_teach_nothing():
    advantages = group_advantages(jnp.full(4, 0.1), 4)

    def total(policy):
        mask = jnp.ones((4, 3), bool)
        out = grpo_loss(policy_logps=policy, old_logps=policy - 0.3, advantages=advantages, completion_mask=mask)
        return out.losses.sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(-jnp.ones((4, 3)))
    assert float(value) == 0.0
    np.testing.assert_array_equal(gradient, jnp.zeros((4, 3)))


FAMILY = {  # name: (normalization, aggregation, eps_high, beta)
    "grpo": ("group", "sequence_mean", 0.2, 0.04),
    "dr_grpo": ("none", "constant", 0.2, 0.0),
    "dapo": ("group", "token_mean", 0.28, 0.0),
}


@pytest.mark.parametrize("member", FAMILY)
def test_family_is_the_published_formula(member):
    """From rewards to the final number, as each paper writes it."""
    normalization, aggregation, high, beta = FAMILY[member]
    prompts, group_size, time, max_length = 2, 4, 5, 9
    rng = np.random.default_rng(7)
    lengths = rng.integers(1, time + 1, prompts * group_size)
    mask = np.arange(time) < lengths[:, None]
    old = random_logps(rng, prompts * group_size, time)
    policy, ref = (old + rng.normal(scale=0.3, size=old.shape).astype(np.float32) for _ in range(2))
    rewards = rng.integers(2, size=prompts * group_size).astype(np.float32)

    objective, tokens = 0.0, 0
    for p in range(prompts):
        group = slice(p * group_size, (p + 1) * group_size)
        for i in range(group.start, group.stop):
            advantage = rewards[i] - rewards[group].mean()
            if normalization == "group":
                advantage /= rewards[group].std(ddof=1) + 1e-4
            terms = []
            for t in range(lengths[i]):
                ratio, r = np.exp(policy[i, t] - old[i, t]), np.exp(ref[i, t] - policy[i, t])
                surrogate = min(ratio * advantage, np.clip(ratio, 0.8, 1 + high) * advantage)
                terms.append(surrogate - beta * (r - np.log(r) - 1))
            scale = {"grpo": 1 / lengths[i], "dr_grpo": 1 / max_length, "dapo": 1.0}[member]
            objective, tokens = objective + scale * sum(terms), tokens + lengths[i]
    objective /= tokens if member == "dapo" else prompts * group_size

    output = jit_loss(
        policy_logps=jnp.asarray(policy),
        old_logps=jnp.asarray(old),
        advantages=group_advantages(jnp.asarray(rewards), group_size, normalization=normalization),
        completion_mask=jnp.asarray(mask),
        clip_eps_high=high,
        **({"ref_logps": jnp.asarray(ref), "beta": beta} if beta else {}),
    )
    loss = reduce(output.losses, jnp.asarray(mask), aggregation=aggregation, max_length=max_length).mean()
    np.testing.assert_allclose(loss, -objective, rtol=1e-5, atol=1e-6)


def test_huge_ratio_stays_finite():
    (value, _), gradient = token_gradient(np.float32(200.0), -1.0, 0.2, 0.3)
    assert np.isfinite(value) and np.isfinite(gradient) and gradient > 0


def test_reference_without_beta_only_measures():
    policy, ref = jnp.array(-0.3), jnp.zeros((1, 1))
    plain, plain_metrics = token_loss(policy, 1.0)
    measured, metrics = token_loss(policy, 1.0, ref_logps=ref)
    assert float(plain) == float(measured)
    assert set(metrics) - set(plain_metrics) == {"kl_ref"} and float(metrics["kl_ref"][0, 0]) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_estimator": "k1"}, "kl_estimator: got 'k1'.*expected gradient is zero"),
        ({"kl_estimator": "k9"}, "kl_estimator: got 'k9', expected k2 or k3"),
        ({"beta": 0.1}, "beta: given, but it would have no effect because ref_logps is None"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        token_loss(jnp.zeros(()), 1.0, **options)


def test_the_default_clip_is_a_fifth_on_either_side():
    logps, advantages = jnp.log(jnp.array([[1.5, 0.5]])), jnp.array([[1.0, -1.0]])
    mask = jnp.ones((1, 2), bool)
    output = grpo_loss(policy_logps=logps, old_logps=0 * logps, advantages=advantages, completion_mask=mask)
    np.testing.assert_allclose(output.losses, [[-1.2, 0.8]], rtol=1e-6)


def test_a_two_sided_clip_within_the_upper_clip_is_refused_by_its_name():
    ones = jnp.ones((1, 2))
    rows = {"policy_logps": ones, "old_logps": ones, "advantages": ones, "completion_mask": ones > 0}
    with pytest.raises(ValueError, match=r"^delta: got 1.25, expected above 1 \+ clip_eps_high = 1.28"):
        grpo_loss(**rows, clip_eps_low=0.2, clip_eps_high=0.28, delta=1.25)
