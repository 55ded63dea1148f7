"""The process reward model's loss, the scores of solutions and the dense reward, against explicit loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.prm import prm_loss, solution_scores
from objectives.reduce import token_mean
from tests.objectives.cases import SEEDS, SHAPES, fill, random_mask

jit_loss = jax.jit(prm_loss)
jit_scores = functools.partial(jax.jit, static_argnames="reduction")(solution_scores)


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_golden(labels):
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        shape = SHAPES[seed % len(SHAPES)]
        mask = random_mask(rng, *shape)
        logits = (3 * rng.normal(size=(*shape, 2))).astype(np.float32)
        p = (rng.random(shape) if labels == "soft" else rng.integers(2, size=shape)).astype(np.float32)
        if seed % 7 == 0:
            p[:] = 1.0
        expected = {name: np.zeros(shape) for name in ("losses", "accuracy", "step_prob", "label")}
        for b, t in zip(*np.nonzero(mask), strict=True):
            weights = [np.exp(float(z)) for z in logits[b, t]]
            wrong, right = (w / sum(weights) for w in weights)
            label = float(p[b, t])
            expected["losses"][b, t] = -label * np.log(right) - (1 - label) * np.log(wrong)
            expected["accuracy"][b, t] = (right > 0.5) == (label > 0.5)
            expected["step_prob"][b, t], expected["label"][b, t] = right, label
        dirty = np.stack([fill(logits[..., k], mask) for k in (0, 1)], axis=-1)
        got = jit_loss(step_logits=dirty, labels=fill(p, mask), label_mask=mask)
        assert {"losses", *got.metrics} == set(expected)
        for name, array in {"losses": got.losses, **got.metrics}.items():
            kept = np.where(mask, array, 0.0)
            np.testing.assert_allclose(kept, expected[name], rtol=1e-5, atol=1e-5, err_msg=f"{name}, {seed}")
        np.testing.assert_array_equal(np.asarray(got.losses)[~mask], 0.0)


def test_equal_logits_cost_log_two_and_class_one_is_correct():
    mask = jnp.ones((1, 1), bool)

    @jax.jit
    def loss(logits, label):
        return prm_loss(step_logits=logits, labels=jnp.full((1, 1), label), label_mask=mask).losses[0, 0]

    for label in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(loss(jnp.full((1, 1, 2), 7.0), label), np.log(2), rtol=1e-6)
    gradient = jax.grad(loss)(jnp.zeros((1, 1, 2)), 1.0)
    np.testing.assert_allclose(gradient, [[[0.5, -0.5]]])  # descent raises the logit of "correct"


def test_a_soft_label_is_best_met_at_its_own_probability():
    mask = jnp.ones((1, 1), bool)

    @jax.jit
    def loss(margin):
        logits = jnp.stack([jnp.zeros((1, 1)), margin.reshape(1, 1)], axis=-1)
        return prm_loss(step_logits=logits, labels=jnp.full((1, 1), 0.7), label_mask=mask).losses[0, 0]

    best = jnp.log(0.7 / 0.3)
    np.testing.assert_allclose(jax.grad(loss)(best), 0.0, atol=1e-6)
    assert float(loss(best)) < float(loss(best + 1.0)) and float(loss(best)) < float(loss(best - 1.0))


def test_unlabelled_tokens_teach_nothing_and_each_step_counts_once():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 2)).astype(np.float32)
    mask = np.array([[0, 1, 0, 0, 1], [0, 0, 1, 0, 0]], bool)
    labels = np.array([[0, 1, 0, 0, 0], [0, 0, 1, 0, 0]], np.float32)

    def mean(logits):
        return token_mean(prm_loss(step_logits=logits, labels=labels, label_mask=mask).losses, mask).mean()

    value, gradient = jax.jit(jax.value_and_grad(mean))(logits)
    assert np.all((np.abs(gradient).sum(-1) > 0) == mask)
    steps = [jax.nn.log_softmax(logits[b, t])[int(labels[b, t])] for b, t in zip(*np.nonzero(mask), strict=True)]
    np.testing.assert_allclose(value, -sum(steps) / 3, rtol=1e-5)


def test_huge_logits_stay_finite():
    logits = jnp.array([[[1e4, -1e4]]])
    arrays = {"labels": jnp.ones((1, 1)), "label_mask": jnp.ones((1, 1), bool)}
    value, gradient = jax.value_and_grad(lambda z: jit_loss(step_logits=z, **arrays).losses.sum())(logits)
    np.testing.assert_allclose(value, 2e4)
    np.testing.assert_allclose(gradient, [[[1.0, -1.0]]])


@pytest.mark.parametrize("reduction", ["min", "prod", "last", "mean"])
def test_solution_scores_golden(reduction):
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        shape = SHAPES[seed % len(SHAPES)]
        mask = random_mask(rng, *shape)
        probs = rng.random(shape).astype(np.float32)
        expected = np.zeros(shape[0])
        for b, row in enumerate(mask):
            steps = [float(probs[b, s]) for s in np.flatnonzero(row)]
            if not steps:
                continue
            expected[b] = {
                "min": min(steps),
                "prod": np.prod(steps),
                "last": steps[-1],
                "mean": sum(steps) / len(steps),
            }[reduction]
        got = jit_scores(step_probs=fill(probs, mask), step_mask=mask, reduction=reduction)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}")


def test_unknown_reduction_is_refused():
    ones = jnp.ones((1, 1))
    with pytest.raises(ValueError, match="reduction: got 'max', expected one of min, prod, last, mean"):
        solution_scores(step_probs=ones, step_mask=ones > 0, reduction="max")


def test_scores_have_no_gradient():
    mask = jnp.array([[True, False, True]])

    def total(probs):
        return solution_scores(step_probs=probs, step_mask=mask, reduction="prod").sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.ones((1, 3))), jnp.zeros((1, 3)))
