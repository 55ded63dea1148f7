"""Mini-batches are the batch in another order, and teach what it teaches."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from research.algorithms.base import Frozen
from research.core.batch import RolloutBatch
from research.core.mesh import to_device
from research.core.network import Network
from research.train.minibatches import mini_batches, permuted_rows
from tests.research.algorithms.toy import (
    MODEL,
    eight_devices,
    grpo,
    host_params,
    objective_scalars,
    one_device,
    quick_compilation,
    rollouts,
)

SEED = (3, 5, 0)


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with quick_compilation():
        yield


def prepared() -> RolloutBatch:
    """Eight prompts of two completions of uneven lengths; advantages and old log-probs are there."""
    rng = np.random.default_rng(1)
    drawn = rollouts(rng.random(16), rng.integers(1, 9, 16), group_size=2)
    batch, _ = grpo(group_size=2, kl="none").from_rollouts(drawn, 0)
    assert isinstance(batch, RolloutBatch)
    return batch.replace(advantages=rng.normal(0, 1, 16).astype(np.float32), old_logps=batch.sampler_logps.copy())


@pytest.mark.parametrize(("group_size", "parts"), [(1, 2), (2, 4), (4, 4), (16, 1)])
def test_each_row_is_in_one_part_beside_its_group(group_size: int, parts: int) -> None:
    found = permuted_rows(16, group_size, parts, SEED)
    assert found.shape == (parts, 16 // parts)
    assert sorted(found.reshape(-1).tolist()) == list(range(16))
    groups = found.reshape(-1, group_size)
    np.testing.assert_array_equal(groups, groups[:, :1] + np.arange(group_size))
    assert not (groups[:, 0] % group_size).any()


def test_the_order_depends_on_seed_iteration_and_pass() -> None:
    orders = [permuted_rows(64, 1, 2, seed) for seed in (SEED, (4, 5, 0), (3, 6, 0), (3, 5, 1))]
    assert len({order.tobytes() for order in orders}) == 4
    np.testing.assert_array_equal(orders[0], permuted_rows(64, 1, 2, SEED))
    # and on nothing else that is drawn from (seed, iteration)
    other = np.random.default_rng(np.random.SeedSequence(SEED[:2])).permutation(64)
    assert not np.array_equal(orders[0].reshape(-1), other)


def test_each_group_meets_all_others_over_the_passes() -> None:
    """No pair of groups is always together: chance is 1/3, of 300 passes about 100."""
    together = Counter(
        pair
        for epoch in range(300)
        for part in permuted_rows(4, 1, 2, (0, 1, epoch))
        for pair in [tuple(sorted(part.tolist()))]
    )
    assert len(together) == 6 and all(60 < count < 140 for count in together.values())


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="minibatches: got 3, expected a divisor of the batch's 4 groups"):
        permuted_rows(16, 4, 3, SEED)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_parts_together_are_the_batch_on_any_mesh(devices: int) -> None:
    host = prepared()
    mesh = one_device() if devices == 1 else eight_devices()
    with jax.set_mesh(mesh):
        batch = to_device(mesh, host)
        parts = list(mini_batches(host, batch, mesh, parts=2, seed=SEED))
        assert len(parts) == 2
        order = permuted_rows(16, 2, 2, SEED)
        for (counted, taken), rows in zip(parts, order, strict=True):
            assert taken.sequences.group_size == 2
            for got, same, whole, source in zip(*map(jax.tree.leaves, (taken, counted, host, batch)), strict=True):
                np.testing.assert_array_equal(got, whole[rows])
                np.testing.assert_array_equal(same, whole[rows])
                assert got.sharding.is_equivalent_to(source.sharding, got.ndim)
        [(counted, taken)] = mini_batches(host, batch, mesh, parts=1, seed=SEED)
        assert counted is host and taken is batch


@pytest.mark.parametrize(
    "aggregation", ["token_mean", *(pytest.param(x, marks=pytest.mark.slow) for x in ("sequence_mean", "constant"))]
)
def test_gradients_of_the_parts_average_to_that_of_the_batch(aggregation: Any) -> None:
    """At equal parameters, each part weighted by what it counts."""
    algorithm, mesh, host = grpo(group_size=2, kl="none", aggregation=aggregation), one_device(), prepared()
    scalars = objective_scalars(algorithm)

    @jax.jit
    def gradient(params: Any, batch: RolloutBatch) -> Any:
        def mean(params: Any) -> Any:
            loss, _ = algorithm.loss(Network(params, MODEL), batch, scalars, Frozen())
            return loss.mean(), loss.count

        return jax.grad(mean, has_aux=True)(params)

    with jax.set_mesh(mesh):
        params, batch = host_params(), to_device(mesh, host)
        whole, count = gradient(params, batch)
        parts = [gradient(params, part) for _, part in mini_batches(host, batch, mesh, parts=4, seed=SEED)]
    counts = np.array([float(each) for _, each in parts])
    assert counts.sum() == pytest.approx(float(count))
    if aggregation == "token_mean":
        assert len(set(counts.tolist())) > 1
    mean = jax.tree.map(lambda *leaves: np.average(leaves, axis=0, weights=counts), *(found for found, _ in parts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), mean, whole)
