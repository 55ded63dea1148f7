"""The members of GRPO's family beyond its clip: GSPO, CISPO, SAPO, two-sided clip, corrected KL, weights."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.grpo import grpo_loss
from objectives.kl import kl_estimate
from objectives.reduce import reduce
from tests.objectives.cases import SEEDS, SHAPES, fill, random_logps, random_mask

STATIC = ("kl_estimator", "ratio_level", "surrogate", "kl_correction")
jit_loss = functools.partial(jax.jit, static_argnames=STATIC)(grpo_loss)

SURROGATES = {
    "clip": {"clip_eps_low": 0.2, "clip_eps_high": 0.28},
    "two_sided": {"clip_eps_low": 0.2, "clip_eps_high": 0.28, "delta": 1.5},
    "cispo": {"surrogate": "cispo", "cispo_clip": 1.4},
    "sapo": {"surrogate": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.5},
}
VARIANTS = [
    (surrogate, level, per_token)
    for surrogate, level, per_token in itertools.product(
        SURROGATES, ("token", "sequence", "sequence_token"), (False, True)
    )
    if surrogate == "cispo" and level != "sequence_token"
    or surrogate != "cispo" and not (level == "sequence" and per_token)
]  # fmt: skip


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def loop_loss_and_gradient(surrogate, level, policy, old, advantages, mask):
    """Losses, and the gradient of their sum for the policy's log-probs, derived by hand from the papers."""
    losses, gradient = np.zeros(mask.shape), np.zeros(mask.shape)
    for b, row in enumerate(mask):
        slots = np.flatnonzero(row)
        for t in slots:
            a = float(advantages[b]) if advantages.ndim == 1 else float(advantages[b, t])
            used = [t] if level == "token" else slots
            ratio = np.exp(sum(float(policy[b, u]) - float(old[b, u]) for u in used) / len(used))
            if surrogate == "cispo":
                losses[b, t] = -min(ratio, 1.4) * a * float(policy[b, t])
                gradient[b, t] += -min(ratio, 1.4) * a
                continue
            if surrogate == "sapo":
                tau = 1.0 if a > 0 else 1.5
                s = sigmoid(tau * (ratio - 1))
                losses[b, t], slope = -4 / tau * s * a, -4 * s * (1 - s) * a
            else:
                clipped = min(max(ratio, 0.8), 1.28)
                bound = ratio if surrogate == "clip" else min(ratio, 1.5)
                losses[b, t] = -min(bound * a, clipped * a)
                slope = -a if losses[b, t] == -ratio * a else 0.0
            if level == "sequence":  # each token moves the mean by 1 / length
                gradient[b, slots] += slope * ratio / len(slots)
            else:
                gradient[b, t] += slope * ratio
    return losses, gradient


@pytest.mark.parametrize(("surrogate", "level", "per_token"), VARIANTS)
def test_golden_value_and_gradient(surrogate, level, per_token):
    @jax.jit
    def evaluate(policy, old, advantages, mask):
        def total(policy):
            out = grpo_loss(
                policy_logps=policy,
                old_logps=old,
                advantages=advantages,
                completion_mask=mask,
                ratio_level=level,
                **SURROGATES[surrogate],
            )
            return out.losses.sum(), out.losses

        return jax.grad(total, has_aux=True)(policy)

    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        shape = SHAPES[seed % len(SHAPES)]
        mask = random_mask(rng, *shape)
        old = random_logps(rng, *shape)
        policy = old + rng.normal(scale=0.5, size=shape).astype(np.float32)
        size = shape if per_token else shape[:1]
        advantages = rng.choice([-1.5, -0.2, 0.0, 0.3, 2.0], size).astype(np.float32)
        if seed % 6 == 0:
            advantages[:] = 0.0  # all-equal rewards
        expected = loop_loss_and_gradient(surrogate, level, policy, old, advantages, mask)
        filled = fill(advantages, mask) if per_token else advantages
        gradient, losses = evaluate(fill(policy, mask), fill(old, mask), filled, mask)
        for name, got, value in zip(("losses", "gradient"), (losses, gradient), expected, strict=True):
            np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-5, err_msg=f"{name}, seed {seed}")
            np.testing.assert_array_equal(np.asarray(got)[~mask], 0.0)


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_on_policy_gradient_is_reinforce(surrogate, level):
    """At ratio 1, summed over a completion, every surrogate at every level has the gradient of `-A log pi`.

    For CISPO only because its cap is above 1; for SAPO because 4 / tau undoes the slope of the sigmoid.
    """
    if (surrogate, level) == ("cispo", "sequence_token"):
        return  # refused: it is cispo at "sequence"
    logps = jnp.array([[-0.5, -2.0, -0.1], [-1.0, -0.3, -4.0]])
    mask = jnp.array([[True, True, False], [True, True, True]])
    advantages = jnp.array([1.5, -0.5])

    def total(policy):
        arrays = {"policy_logps": policy, "old_logps": logps, "completion_mask": mask}
        out = grpo_loss(**arrays, advantages=advantages, ratio_level=level, **SURROGATES[surrogate])
        return out.losses.sum()

    expected = jnp.where(mask, -advantages[:, None], 0.0)
    np.testing.assert_allclose(jax.jit(jax.grad(total))(logps), expected, rtol=1e-5, atol=1e-6)


def one_token(log_ratio, advantage, **options):
    ones = jnp.ones((1, 1))
    out = grpo_loss(
        policy_logps=log_ratio - ones, old_logps=-ones, advantages=advantage, completion_mask=ones > 0, **options
    )
    return out.losses.sum(), out.metrics


@functools.partial(jax.jit, static_argnames="surrogate")
def value_and_gradient(log_ratio, advantage, surrogate):
    options = SURROGATES[surrogate]
    return jax.value_and_grad(lambda x: one_token(x, advantage, **options), has_aux=True)(log_ratio)


@pytest.mark.parametrize(
    ("surrogate", "advantage", "ratio", "slope"),
    [  # slope: the gradient is -slope * A
        ("two_sided", 2.0, 1.6, 0.0),
        ("two_sided", 2.0, 0.5, 0.5),
        ("two_sided", -2.0, 0.5, 0.0),
        ("two_sided", -2.0, 1.4, 1.4),  # above the clip range, pushed down
        ("two_sided", -2.0, 1.6, 0.0),  # above delta: let go
        ("cispo", 2.0, 0.5, 0.5),  # no token is let go
        ("cispo", 2.0, 1.6, 1.4),
        ("cispo", -2.0, 0.5, 0.5),
        ("cispo", -2.0, 1.6, 1.4),
        ("sapo", 2.0, 1.0, 1.0),
        ("sapo", -2.0, 1.0, 1.0),
        ("sapo", 2.0, 3.0, 3 * 4 * sigmoid(2.0) * sigmoid(-2.0)),  # fades on either side
        ("sapo", -2.0, 3.0, 3 * 4 * sigmoid(3.0) * sigmoid(-3.0)),  # sooner for a bad token
        ("sapo", 2.0, 0.5, 0.5 * 4 * sigmoid(0.5) * sigmoid(-0.5)),
        ("sapo", -2.0, 0.5, 0.5 * 4 * sigmoid(0.75) * sigmoid(-0.75)),
    ],
)
def test_sign_table(surrogate, advantage, ratio, slope):
    advantages = np.full(1, advantage, np.float32)
    (_, metrics), gradient = value_and_gradient(np.float32(np.log(ratio)), advantages, surrogate)
    np.testing.assert_allclose(gradient, -slope * advantage, rtol=1e-5, atol=1e-7)
    if surrogate == "two_sided":
        assert bool(metrics["clip_fraction"][0, 0]) == (slope == 0.0)
        assert bool(metrics["clip_fraction_dual"][0, 0]) == (advantage < 0 and ratio > 1.5)
    elif surrogate == "cispo":
        assert bool(metrics["cispo_clip_fraction"][0, 0]) == (ratio > 1.4)
    else:
        np.testing.assert_allclose(metrics["sapo_gate"], [[slope / ratio]], rtol=1e-5)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_huge_ratio_stays_finite(surrogate):
    for log_ratio, advantage in itertools.product((200.0, -200.0), (1.0, -1.0)):
        advantages = np.full(1, advantage, np.float32)
        (value, _), gradient = value_and_gradient(np.float32(log_ratio), advantages, surrogate)
        assert np.isfinite(value) and np.isfinite(gradient)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_gspo_token_with_one_advantage_per_sequence_is_gspo(aggregation):
    rng = np.random.default_rng(2)
    mask = np.arange(6) < np.array([6, 1, 3, 4])[:, None]
    old = random_logps(rng, 4, 6)
    policy = old + rng.normal(scale=0.4, size=(4, 6)).astype(np.float32)
    advantages = np.array([1.0, -2.0, -0.5, 0.7], np.float32)

    @functools.partial(jax.jit, static_argnames="level")
    def loss(policy, level):
        out = grpo_loss(
            policy_logps=policy, old_logps=old, advantages=advantages, completion_mask=mask, ratio_level=level
        )
        return reduce(out.losses, mask, aggregation=aggregation).mean()

    results = [jax.value_and_grad(loss)(policy, level) for level in ("sequence", "sequence_token")]
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)


def test_the_sequence_ratio_does_not_grow_with_length():
    """Every token off by 0.01: the ratio is e^0.01 at any length, a product would be e^(0.01 |y|)."""
    for length in (1, 3, 50):
        mask = jnp.arange(50)[None] < length
        policy = jnp.full((1, 50), -1.0)
        out = jit_loss(
            policy_logps=policy,
            old_logps=policy - 0.01,
            advantages=jnp.ones(1),
            completion_mask=mask,
            ratio_level="sequence",
        )
        np.testing.assert_allclose(out.metrics["ratio"][0, :length], np.exp(0.01), rtol=1e-6)
        np.testing.assert_allclose(out.losses, -np.exp(0.01) * np.asarray(mask), rtol=1e-6)


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_importance_weights_scale_the_surrogate_and_not_the_kl(surrogate, per_token):
    rng = np.random.default_rng(3)
    mask = np.arange(4) < np.array([4, 1, 2])[:, None]
    policy, old, ref = (random_logps(rng, 3, 4) for _ in range(3))
    weights = rng.uniform(0.0, 2.0, (3, 4) if per_token else 3).astype(np.float32)
    arrays = {"policy_logps": policy, "old_logps": old, "completion_mask": mask}
    arrays["advantages"] = rng.normal(size=3).astype(np.float32)
    plain = jit_loss(**arrays, **SURROGATES[surrogate]).losses
    both = jit_loss(**arrays, **SURROGATES[surrogate], importance_weights=weights, ref_logps=ref, beta=0.5)
    factor = weights if per_token else weights[:, None]
    penalty = jnp.where(mask, kl_estimate(policy, ref, "k3"), 0.0)
    np.testing.assert_allclose(both.losses, plain * factor + 0.5 * penalty, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(both.metrics["importance_weight"], np.where(mask, factor, 0.0))


def test_the_corrected_kl_descends_the_reverse_kl_from_old_samples():
    """Expected over a categorical old policy; without the correction the gradient is another one."""
    logits, old_logits, ref_logits = jax.random.normal(jax.random.key(1), (3, 6))
    old, ref = jax.nn.log_softmax(old_logits), jax.nn.log_softmax(ref_logits)

    @functools.partial(jax.jit, static_argnames="correction")
    def expected_penalty(logits, correction):
        out = grpo_loss(
            policy_logps=jax.nn.log_softmax(logits)[:, None],
            old_logps=old[:, None],
            advantages=jnp.zeros(6),
            completion_mask=jnp.ones((6, 1), bool),
            ref_logps=ref[:, None],
            beta=1.0,
            kl_correction=correction,
        )
        return jnp.sum(jnp.exp(old) * out.losses[:, 0])

    def kl(logits):
        logps = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logps) * (logps - ref))

    value, gradient = jax.value_and_grad(expected_penalty)(logits, "ratio")
    np.testing.assert_allclose(value, kl(logits), rtol=1e-5)
    np.testing.assert_allclose(gradient, jax.grad(kl)(logits), rtol=1e-4, atol=1e-6)
    plain = jax.grad(expected_penalty)(logits, "none")
    assert np.abs(np.asarray(plain - gradient)).max() > 1e-2


def test_the_corrected_kl_takes_the_tokens_ratio_at_every_level():
    policy, old, ref = jnp.array([[-1.0, -2.0]]), jnp.array([[-1.5, -1.0]]), jnp.array([[-0.5, -3.0]])
    expected = jnp.exp(policy - old) * kl_estimate(policy, ref, "k3")
    for level in ("token", "sequence", "sequence_token"):
        out = jit_loss(
            policy_logps=policy,
            old_logps=old,
            advantages=jnp.zeros(1),
            completion_mask=jnp.ones((1, 2), bool),
            ref_logps=ref,
            beta=1.0,
            kl_correction="ratio",
            ratio_level=level,
        )
        np.testing.assert_allclose(out.losses, expected, rtol=1e-6)


CISPO, SAPO = SURROGATES["cispo"], SURROGATES["sapo"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"surrogate": "ppo"}, "surrogate: got 'ppo', expected one of clip, cispo, sapo"),
        ({"ratio_level": "word"}, "ratio_level: got 'word', expected one of token, sequence, sequence_token"),
        ({"kl_correction": "yes"}, "kl_correction: got 'yes', expected one of none, ratio"),
        ({**CISPO, "delta": 2.0}, "delta: given.*no effect because surrogate is 'cispo', not 'clip'"),
        ({**SAPO, "delta": 2.0}, "delta: given.*no effect because surrogate is 'sapo'"),
        ({"cispo_clip": 2.0}, "cispo_clip: given.*no effect because surrogate is 'clip', not 'cispo'"),
        ({"sapo_temperature_pos": 1.0}, "sapo_temperature_pos: given.*no effect"),
        ({"sapo_temperature_neg": 1.0}, "sapo_temperature_neg: given.*no effect"),
        ({"surrogate": "cispo"}, "cispo_clip: got None, expected a number because surrogate is 'cispo'"),
        ({**SAPO, "sapo_temperature_neg": None}, "sapo_temperature_neg: got None, expected a number"),
        ({"delta": 1.1}, "delta: got 1.1, expected above 1 \\+ clip_eps_high = 1.2"),
        ({**CISPO, "ratio_level": "sequence_token"}, "ratio_level: got 'sequence_token'.*the same"),
        (
            {"ratio_level": "sequence", "advantages": jnp.zeros((1, 1))},
            "advantages: got one per token.*use 'sequence_token'",
        ),
        ({"kl_correction": "ratio"}, "kl_correction: given.*because ref_logps is None"),
        (
            {"kl_correction": "ratio", "ref_logps": jnp.zeros((1, 1)), "kl_estimator": "k2"},
            "kl_correction: got 'ratio' with kl_estimator 'k2', expected k3",
        ),
        ({"advantages": jnp.zeros((1, 3))}, r"advantages: got shape \(1, 3\), expected \(1, 1\) or \(1,\)"),
        ({"importance_weights": jnp.zeros((1, 3))}, r"importance_weights: got shape \(1, 3\)"),
    ],
)
def test_refusals(options, message):
    options = {"advantages": jnp.ones(1)} | options
    with pytest.raises(ValueError, match=message):
        one_token(jnp.zeros(()), options.pop("advantages"), **options)
