"""Pairs, rankings and ensembles against explicit loops; limits; refusals."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.bradley_terry import bradley_terry_loss, ensemble_score, ranking_loss
from objectives.reduce import reduce_metrics
from tests.objectives.cases import SEEDS, SHAPES, fill, random_mask

jit_pairs = jax.jit(bradley_terry_loss)
jit_ranking = jax.jit(ranking_loss)


def nll(d):
    return math.log1p(math.exp(-d))


@pytest.mark.parametrize("has_margins", [False, True])
@pytest.mark.parametrize("has_soft_labels", [False, True])
def test_golden(has_margins, has_soft_labels):
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        batch, coef = [5, 1][seed % 2], [0.0, 0.01, 1.0][seed % 3]
        chosen, rejected = rng.normal(scale=3, size=(2, batch)).astype(np.float32)
        if seed % 5 == 0:
            rejected = chosen
        margins = rng.uniform(0, 3, batch).astype(np.float32) if has_margins else None
        labels = rng.choice([0.0, 0.3, 1.0], batch).astype(np.float32) if has_soft_labels else None
        got = jit_pairs(
            chosen_scores=chosen, rejected_scores=rejected, margins=margins, soft_labels=labels, center_coef=coef
        )
        for b in range(batch):
            c, r = float(chosen[b]), float(rejected[b])
            d = c - r - (float(margins[b]) if has_margins else 0.0)
            p = float(labels[b]) if has_soft_labels else 1.0
            expected = p * nll(d) + (1 - p) * nll(-d) + coef * (c + r) ** 2
            np.testing.assert_allclose(got.losses[b], expected, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}")
            metrics = {
                "rewards_chosen": c,
                "rewards_rejected": r,
                "reward_margin": c - r,
                "reward_accuracy": float(c > r),
                "center": (c + r) ** 2,
            }
            assert set(metrics) == set(got.metrics)
            for name, value in metrics.items():
                np.testing.assert_allclose(got.metrics[name][b], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_equal_scores_cost_log_2_and_pull_apart_evenly():
    scores = jnp.array([-2.0, 0.0, 7.0])
    loss, gradient = jax.value_and_grad(
        lambda c, r: bradley_terry_loss(chosen_scores=c, rejected_scores=r).losses.sum(), (0, 1)
    )(scores, scores)
    np.testing.assert_allclose(loss / 3, math.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-0.5] * 3, [0.5] * 3], rtol=1e-6)


def test_a_soft_label_is_where_its_loss_is_least_and_swaps_with_the_pair():
    p = jnp.array([0.1, 0.5, 0.8])
    logit = jnp.log(p / (1 - p))

    def loss(chosen, rejected, labels):
        return bradley_terry_loss(chosen_scores=chosen, rejected_scores=rejected, soft_labels=labels).losses

    gradient = jax.grad(lambda d: loss(d, jnp.zeros(3), p).sum())(logit)
    np.testing.assert_allclose(gradient, jnp.zeros(3), atol=1e-6)
    np.testing.assert_allclose(loss(logit, p, p), loss(p, logit, 1 - p), rtol=1e-5)


def test_a_margin_asks_for_that_much_more():
    one = jnp.ones(1)
    shifted = bradley_terry_loss(chosen_scores=3 * one, rejected_scores=one, margins=2 * one)
    np.testing.assert_allclose(shifted.losses, math.log(2), rtol=1e-6)
    assert float(shifted.metrics["reward_margin"][0]) == 2.0  # before the margin


def test_centering_sees_what_the_comparison_cannot():
    def loss(shift, coef):
        output = bradley_terry_loss(
            chosen_scores=jnp.ones(1) + shift, rejected_scores=-jnp.ones(1) + shift, center_coef=coef
        )
        return output.losses[0]

    assert float(jax.grad(loss)(3.0, 0.0)) == 0.0
    np.testing.assert_allclose(jax.grad(loss)(3.0, 0.5), 0.5 * 2 * 6 * 2, rtol=1e-5)


@pytest.mark.parametrize("difference", [-1e4, 1e4])
def test_extreme_scores_are_finite(difference):
    def loss(chosen):
        return bradley_terry_loss(chosen_scores=chosen, rejected_scores=jnp.zeros(1)).losses[0]

    value, gradient = jax.value_and_grad(loss)(jnp.array([difference]))
    np.testing.assert_allclose([value, gradient[0]], [1e4, -1.0] if difference < 0 else [0.0, 0.0])


def test_ranking_golden():
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        shape, coef = SHAPES[seed % len(SHAPES)], [0.0, 0.1][seed % 2]
        mask = random_mask(rng, *shape)
        ranks = rng.integers(0, 4, shape)
        scores = rng.normal(scale=2, size=shape).astype(np.float32)
        got = jit_ranking(scores=fill(scores, mask), ranks=np.where(mask, ranks, -9), mask=mask, center_coef=coef)
        for p in range(shape[0]):
            terms, margins = [], []
            for i in np.flatnonzero(mask[p]):
                for j in np.flatnonzero(mask[p]):
                    if ranks[p, i] < ranks[p, j]:
                        si, sj = float(scores[p, i]), float(scores[p, j])
                        terms.append(nll(si - sj) + coef * (si + sj) ** 2)
                        margins.append(si - sj)
            np.testing.assert_allclose(
                got.losses[p], np.mean(terms) if terms else 0.0, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}"
            )
            assert float(got.metrics["pairs"][p]) == len(terms)
            assert float(got.metrics["no_pair"][p]) == (not terms)
            margin, accuracy = got.metrics["reward_margin"], got.metrics["reward_accuracy"]
            assert float(margin.where[p]) == float(accuracy.where[p]) == bool(terms)
            if terms:
                np.testing.assert_allclose(margin.values[p], np.mean(margins), rtol=1e-5, atol=1e-5)
                np.testing.assert_allclose(accuracy.values[p], np.mean(np.array(margins) > 0), rtol=1e-5)


def test_a_ranking_of_two_is_a_pair():
    scores, ranks = jnp.array([[0.3, -1.0], [2.0, 4.0]]), jnp.array([[1, 2], [7, 3]])
    ranked = ranking_loss(scores=scores, ranks=ranks, mask=ranks > 0, center_coef=0.2)
    paired = bradley_terry_loss(
        chosen_scores=jnp.array([0.3, 4.0]), rejected_scores=jnp.array([-1.0, 2.0]), center_coef=0.2
    )
    np.testing.assert_allclose(ranked.losses, paired.losses, rtol=1e-6)


def test_prompts_without_a_pair_leave_the_reduced_accuracy_alone():
    scores, ranks = jnp.array([[2.0, 1.0], [1.0, 2.0], [0.0, 0.0]]), jnp.array([[1, 2], [5, 5], [1, 2]])
    mask = jnp.array([[True, True], [True, True], [True, False]])
    output = ranking_loss(scores=scores, ranks=ranks, mask=mask)
    reduced = reduce_metrics(output.metrics)
    assert float(reduced["reward_accuracy"].mean()) == 1.0 and float(reduced["reward_accuracy"].count) == 1.0
    assert float(reduced["no_pair"].mean()) == pytest.approx(2 / 3)
    gradient = jax.grad(lambda s: ranking_loss(scores=s, ranks=ranks, mask=mask).losses.sum())(scores)
    assert np.any(gradient[0]) and not np.any(gradient[1:])


@pytest.mark.parametrize("reduction", ["mean", "min", "mean_minus_variance"])
def test_ensemble_golden(reduction):
    score = functools.partial(ensemble_score, reduction=reduction)
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        scores = rng.normal(scale=2, size=[(4, 5), (1, 3)][seed % 2]).astype(np.float32)
        coef = float(rng.uniform(0.1, 2)) if reduction == "mean_minus_variance" else 0.0
        got = score(scores=scores, variance_coef=coef)
        for b, members in enumerate(scores.T.astype(float)):
            mean = sum(members) / len(members)
            variance = sum((m - mean) ** 2 for m in members) / len(members)
            expected = min(members) if reduction == "min" else mean - coef * variance
            np.testing.assert_allclose(got[b], expected, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}")


def test_an_agreeing_ensemble_is_its_member_and_is_a_reward_without_gradient():
    scores = jnp.tile(jnp.array([[1.0, -2.0]]), (3, 1))
    for reduction in ("mean", "min", "mean_minus_variance"):
        coef = 5.0 if reduction == "mean_minus_variance" else 0.0

        def total(scores, reduction=reduction, coef=coef):
            return ensemble_score(scores=scores, reduction=reduction, variance_coef=coef).sum()

        np.testing.assert_allclose(total(scores), -1.0, rtol=1e-6)
        assert not np.any(jax.grad(total)(scores))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "median"}, "reduction: got 'median', expected one of mean, min, mean_minus_variance"),
        (
            {"reduction": "min", "variance_coef": 0.1},
            "variance_coef: given, but it would have no effect with reduction 'min'",
        ),
    ],
)
def test_ensemble_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        ensemble_score(scores=jnp.zeros((2, 3)), **options)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(AssertionError):
        bradley_terry_loss(chosen_scores=jnp.zeros(3), rejected_scores=jnp.zeros(3), margins=jnp.zeros(1))
    for chosen, rejected in ((jnp.zeros(3), jnp.zeros(1)), (jnp.zeros(1), jnp.zeros(3))):
        with pytest.raises(AssertionError):
            bradley_terry_loss(chosen_scores=chosen, rejected_scores=rejected)
    with pytest.raises(AssertionError):
        ranking_loss(scores=jnp.zeros((2, 3)), ranks=jnp.zeros((1, 3), int), mask=jnp.ones((2, 3), bool))
