"""The reductions against explicit loops; weights, empty rows, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from objectives.reduce import constant, example_mean, reduce, reduce_metrics, sequence_mean, token_mean
from objectives.types import Subset, WeightedSum
from tests.objectives.cases import SEEDS, SHAPES, fill, random_mask

AGGREGATIONS = ["token_mean", "sequence_mean", "constant"]
MAX_LENGTH = 11.0


def loop_reduce(losses, mask, aggregation, weights):
    total = count = 0.0
    for row, row_mask, weight in zip(losses.astype(float), mask, weights, strict=True):
        kept = [loss for loss, keep in zip(row, row_mask, strict=True) if keep]
        if aggregation == "token_mean":
            total, count = total + weight * sum(kept), count + weight * len(kept)
        elif aggregation == "sequence_mean" and kept:
            total, count = total + weight * sum(kept) / len(kept), count + weight
        elif aggregation == "constant":
            total, count = total + weight * sum(kept), count + weight * MAX_LENGTH
    return total, count


@functools.partial(jax.jit, static_argnames="aggregation")
def jit_reduce(losses, mask, weights, aggregation):
    return reduce(losses, mask, aggregation=aggregation, max_length=MAX_LENGTH, weights=weights)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_golden(aggregation, weighted):
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        shape = SHAPES[seed % len(SHAPES)]
        mask = random_mask(rng, *shape)
        losses = fill(rng.normal(size=shape).astype(np.float32), mask)
        weights = rng.choice([0.0, 0.5, 1.0, 3.0], shape[0]).astype(np.float32) if weighted else None
        got = jit_reduce(losses, mask, weights, aggregation)
        expected = loop_reduce(losses, mask, aggregation, np.ones(shape[0]) if weights is None else weights)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradient_is_exact_and_ignores_masked_slots(aggregation):
    rng = np.random.default_rng(0)
    mask = random_mask(rng, 6, 5)
    mask[0], mask[1] = True, False
    losses = rng.normal(size=(6, 5)).astype(np.float32)
    weights = jnp.array([1.0, 1.0, 0.0, 2.0, 1.0, 1.0])
    losses[2] = np.nan  # weight 0

    def mean(losses):
        return reduce(losses, mask, aggregation=aggregation, max_length=MAX_LENGTH, weights=weights).mean()

    clean = jnp.asarray(np.nan_to_num(losses))
    check_grads(jax.jit(mean), (clean,), order=1, modes=("fwd", "rev"), atol=1e-2, rtol=1e-2)
    gradient_of = jax.jit(jax.grad(mean))
    gradient = gradient_of(fill(losses, mask))
    np.testing.assert_array_equal(gradient, gradient_of(clean))
    assert not np.any(np.asarray(gradient)[~mask]) and not np.any(gradient[2])
    # Every reduction is linear in the losses, so its gradient gives the value back.
    np.testing.assert_allclose((gradient * clean).sum(), mean(fill(losses, mask)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_counted_is_zero(aggregation):
    def mean(losses):
        mask = jnp.zeros((2, 3), bool)
        return reduce(losses, mask, aggregation=aggregation, max_length=MAX_LENGTH).mean()

    losses = jnp.full((2, 3), jnp.nan)
    np.testing.assert_array_equal(mean(losses), 0.0)
    np.testing.assert_array_equal(jax.grad(mean)(losses), jnp.zeros((2, 3)))


def test_the_three_aggregations_differ_as_documented():
    losses = jnp.array([[4.0, 0.0, 0.0, 0.0], [1.0, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    mask = jnp.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    assert float(token_mean(losses, mask).mean()) == 1.0  # 5 / 5
    assert float(sequence_mean(losses, mask).mean()) == 1.0  # (1 + 1) / 2: the empty row does not count
    assert float(constant(losses, mask, 10).mean()) == pytest.approx(5 / 30)  # the empty row does
    assert float(constant(losses, mask, 10, weights=jnp.array([1, 1, 0])).mean()) == pytest.approx(5 / 20)


def test_weights_count_in_the_denominator_and_carry_no_gradient():
    losses, mask = jnp.array([[1.0], [5.0]]), jnp.ones((2, 1), bool)
    for scale in (1.0, 7.0):
        assert float(token_mean(losses, mask, weights=jnp.array([3.0, 1.0]) * scale).mean()) == pytest.approx(2)
    gradient = jax.grad(lambda weights: token_mean(losses, mask, weights=weights).total)(jnp.ones(2))
    np.testing.assert_array_equal(gradient, jnp.zeros(2))


def test_weighted_sums_add_and_divide_once():
    losses, mask = jnp.array([[1.0, 2.0], [6.0, 0.0]]), jnp.array([[1, 1], [1, 0]], bool)
    summed = token_mean(losses[:1], mask[:1]) + token_mean(losses[1:], mask[1:])
    assert isinstance(summed, WeightedSum) and float(summed.mean()) == 3.0  # not (1.5 + 6) / 2


def test_example_mean():
    losses = jnp.array([1.0, 5.0, jnp.nan])
    weights = jnp.array([3.0, 1.0, 0.0])
    np.testing.assert_allclose(example_mean(losses, weights), (8.0, 4.0))
    np.testing.assert_allclose(example_mean(losses[:2]), (6.0, 2.0))
    gradient = jax.grad(lambda losses: example_mean(losses, weights).mean())(losses)
    np.testing.assert_allclose(gradient, [0.75, 0.25, 0.0])


def test_reduce_metrics_takes_tokens_by_token_mean_and_examples_by_example_mean():
    mask = jnp.array([[1, 1], [1, 0]], bool)
    metrics = {"token": jnp.array([[1.0, 2.0], [6.0, jnp.nan]]), "row": jnp.array([1.0, 0.0])}
    reduced = reduce_metrics(metrics, mask=mask)
    assert {name: float(value.mean()) for name, value in reduced.items()} == {"token": 3.0, "row": 0.5}
    weighted = reduce_metrics(metrics, mask=mask, weights=jnp.array([1.0, 0.0]))
    assert {name: float(value.mean()) for name, value in weighted.items()} == {"token": 1.5, "row": 1.0}


def test_reduce_metrics_takes_a_subset_by_the_mean_of_its_rows():
    metrics = {"some": Subset(jnp.array([1.0, jnp.nan, 5.0]), jnp.array([1.0, 0.0, 1.0]))}
    metrics["none"] = Subset(jnp.array([jnp.nan] * 3), jnp.zeros(3))
    reduced = reduce_metrics(metrics)
    assert {name: [float(x) for x in value] for name, value in reduced.items()} == {
        "some": [6.0, 2.0],
        "none": [0.0, 0.0],
    }
    weighted = reduce_metrics(metrics, weights=jnp.array([3.0, 9.0, 1.0]))["some"]
    assert float(weighted.mean()) == 2.0 and float(weighted.count) == 4.0


def test_sums_are_float32():
    losses, mask = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((2, 3), jnp.int32)
    outputs = [reduce(losses, mask, aggregation=name, max_length=4) for name in AGGREGATIONS]
    outputs.append(example_mean(losses[:, 0], jnp.ones(2, bool)))
    assert all(isinstance(output, WeightedSum) for output in outputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype("float32")}
    many = jnp.full((1, 4096), 1.001, jnp.bfloat16)  # bf16 sums stall at 256
    np.testing.assert_allclose(token_mean(many, many > 0).mean(), 1.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, m: reduce(x, m, aggregation="mean"), ValueError, "aggregation: got 'mean'"),
        (lambda x, m: reduce(x, m, aggregation="constant"), ValueError, "max_length: got None"),
        (lambda x, m: token_mean(x, m.astype(float)), TypeError, "mask: got dtype float"),
        (lambda x, m: token_mean(x, m[:1]), AssertionError, "same shape|equal shape|shape"),
        (lambda x, m: token_mean(x, m, weights=jnp.ones((2, 1))), AssertionError, "shape"),
        (lambda x, _: reduce_metrics({"kl": x}), ValueError, r"metrics\['kl'\].*expected a mask"),
        (lambda x, m: reduce_metrics({"kl": x.sum()}, mask=m), ValueError, r"got shape \(\), expected \[B\]"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call(jnp.ones((2, 3)), jnp.ones((2, 3), bool))
