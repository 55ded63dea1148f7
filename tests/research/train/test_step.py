"""The update is one function of the global batch: devices, micro-batches and numbers change nothing else."""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from research.algorithms.base import Frozen
from research.algorithms.dpo import DPO
from research.algorithms.grpo import GRPO
from research.algorithms.rejection_sampling import RejectionSampling
from research.algorithms.sft import NextToken
from research.core.batch import Batch
from research.core.cpu import training_options
from research.core.mesh import make_mesh, to_device
from research.core.network import Network
from research.core.optim import make_optimizer
from research.core.state import TrainState
from research.train.step import StepScalars, eval_step, train_step
from tests.research.algorithms.toy import (
    ALGORITHMS,
    MODEL,
    compilations,
    eight_devices,
    frozen_models,
    grpo,
    host_batch,
    objective_scalars,
    one_device,
    optimizer_scalars,
    quick_compilation,
    row_weights,
    step_scalars,
    toy_state,
    with_garbage,
)

STEPS = 2


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with quick_compilation():
        yield


def run(
    name: str, mesh: Mesh, *, micro_batches: int = 1, batches: list[Batch] | None = None
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Two updates from the same initial parameters, everything fetched."""
    algorithm = ALGORITHMS[name]
    batches = batches or [host_batch(algorithm, seed) for seed in range(STEPS)]
    history = []
    with jax.set_mesh(mesh):
        state = toy_state(mesh, algorithm.layout)
        for batch in batches:
            state, metrics = train_step(
                state,
                to_device(mesh, batch),
                step_scalars(algorithm),
                frozen_models(algorithm),
                algorithm=algorithm,
                config=MODEL,
                micro_batches=micro_batches,
            )
            history.append(jax.device_get(metrics))
    return jax.device_get(state), history


@cache
def whole(name: str) -> tuple[TrainState, list[dict[str, Any]]]:
    """The yardstick: one device, one micro-batch."""
    return run(name, one_device())


def assert_same(found: tuple[TrainState, list], expected: tuple[TrainState, list]) -> None:
    """Loss, metrics, parameters, and the optimizer's moments, which are the gradients of both steps."""
    for got, want in zip(found[1], expected[1], strict=True):
        assert got.keys() == want.keys()
        for key in want:
            np.testing.assert_allclose(got[key], want[key], rtol=2e-5, atol=2e-6, err_msg=key)
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(found[0]), jax.tree.leaves(expected[0]), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-6, err_msg=jax.tree_util.keystr(path))


def _each(*quick: str) -> list[Any]:
    """Every algorithm; those that share a batch and a layout with a quick one are slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS]


@pytest.mark.parametrize("name", _each("next_token", "reward_model", "grpo_constant"))
def test_eight_devices_take_the_step_of_one(name: str) -> None:
    assert_same(run(name, eight_devices()), whole(name))


@pytest.mark.parametrize("name", _each("next_token", "dpo", "grpo_constant"))
def test_micro_batches_take_the_step_of_the_whole_batch(name: str) -> None:
    """Rows have 2 to 12 tokens and weights from 0 to 2; one micro-batch of four has weight 0 altogether."""
    assert_same(run(name, one_device(), micro_batches=4), whole(name))


def test_micro_batches_on_two_devices() -> None:
    mesh = make_mesh(2, 1, 1, devices=jax.devices()[:2])
    name = "grpo_token_mean"
    assert_same(run(name, mesh, micro_batches=2), whole(name))


@pytest.mark.parametrize(
    "name", _each("next_token", "dpo", "step_dpo", "kto", "reward_model_ranking", "orm", "distill", "grpo_constant")
)
def test_rows_of_weight_0_contribute_nothing_whatever_they_hold(name: str) -> None:
    batches = [host_batch(ALGORITHMS[name], seed) for seed in range(STEPS)]
    spoiled = [with_garbage(batch) for batch in batches]
    before, after = jax.tree.leaves(batches), jax.tree.leaves(spoiled)
    assert any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert_same(run(name, one_device(), batches=spoiled), whole(name))


def test_a_batch_without_weight_moves_nothing_but_the_decay() -> None:
    batch = host_batch(ALGORITHMS["next_token"])
    nothing = batch.replace(weights=np.zeros_like(batch.weights))
    state, history = run("next_token", one_device(), batches=[nothing])
    assert history[0]["loss"] == 0 and history[0]["grad_norm"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_metrics_are_averaged_with_the_weights_of_the_loss() -> None:
    """With neither smoothing nor z-loss, the loss *is* the metric `nll`, also over micro-batches."""
    algorithm = ALGORITHMS["next_token"]
    scalars = StepScalars(optimizer_scalars(), objective_scalars(algorithm, label_smoothing=0.0, z_loss_coef=0.0))
    for micro_batches in (1, 4):
        mesh = one_device()
        with jax.set_mesh(mesh):
            state = toy_state(mesh)
            _, metrics = train_step(
                state,
                to_device(mesh, host_batch(algorithm)),
                scalars,
                algorithm=algorithm,
                config=MODEL,
                micro_batches=micro_batches,
            )
        assert metrics["loss"] == pytest.approx(float(metrics["nll"]), rel=1e-6)


def test_evaluation_sums_divided_once_are_the_training_metrics() -> None:
    name = "grpo_token_mean"
    algorithm, mesh = ALGORITHMS[name], one_device()
    with jax.set_mesh(mesh):
        params = toy_state(mesh).params
        batch = host_batch(algorithm)
        halves = [jax.tree.map(lambda x, h=h: x[4 * h : 4 * h + 4], batch) for h in range(2)]
        parts = [
            eval_step(params, to_device(mesh, half), objective_scalars(algorithm), algorithm=algorithm, config=MODEL)
            for half in halves
        ]
    expected = whole(name)[1][0]
    for key in parts[0]:
        mean = float((parts[0][key] + parts[1][key]).mean())
        assert mean == pytest.approx(float(expected[key]), rel=2e-5, abs=2e-6), key


def test_each_update_is_at_the_rate_of_its_own_step() -> None:
    """Of SGD's size: with b1 = b2 = 0 and a huge epsilon Adam's update is `-rate * gradient / epsilon`."""
    optimizer = optimizer_scalars(
        learning_rate=100.0, warmup_steps=2, decay_steps=5, end_fraction=0.0, b1=0.0, b2=0.0, eps=1e3,
        weight_decay=0.0, clip_norm=1e9,
    )  # fmt: skip
    algorithm, mesh = ALGORITHMS["next_token"], one_device()
    expected = [50.0, 100.0, 100.0, 75.0, 25.0]
    with jax.set_mesh(mesh):
        state, scalars = toy_state(mesh), StepScalars(optimizer, objective_scalars(algorithm))
        batch = to_device(mesh, host_batch(algorithm))
        for rate in expected:
            before = jax.device_get(state.params)
            state, metrics = train_step(state, batch, scalars, algorithm=algorithm, config=MODEL)
            assert float(metrics["learning_rate"]) == pytest.approx(rate, rel=1e-5)
            moved = jax.tree.map(lambda new, old: np.float64(new) - old, jax.device_get(state.params), before)
            size = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(moved)))
            assert size == pytest.approx(rate * float(metrics["grad_norm"]) / 1e3, rel=1e-2)


def _diverging(case: str) -> tuple[StepScalars, Batch, bool]:
    """Numbers and batch of a step that must be skipped, and whether its loss is the reason."""
    algorithm = ALGORITHMS["dpo"]
    batch, scalars = host_batch(algorithm), step_scalars(algorithm)
    if case == "NaN in the batch":
        logps = np.array(batch.ref_chosen_logps)
        logps[0] = np.nan
        return scalars, batch.replace(ref_chosen_logps=logps), True
    if case == "infinite loss":
        return scalars._replace(objective={**scalars.objective, "beta": np.float32(3e38)}), batch, True
    rate = {"learning rate 1e30": 1e30, "learning rate inf": np.inf}[case]
    optimizer = scalars.optimizer.replace(learning_rate=np.float32(rate), warmup_steps=np.float32(0))
    return scalars._replace(optimizer=optimizer), batch, False


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("case", ["NaN in the batch", "infinite loss", "learning rate 1e30", "learning rate inf"])
def test_an_update_that_is_not_finite_is_skipped(case: str, micro_batches: int) -> None:
    """Parameters and the optimizer's state stay bit for bit; the next healthy update is the first one."""
    algorithm, mesh = ALGORITHMS["dpo"], one_device()
    scalars, batch, loss_is_bad = _diverging(case)

    def step(state: TrainState, batch: Batch, scalars: StepScalars) -> tuple[TrainState, dict[str, Any]]:
        return train_step(
            state, to_device(mesh, batch), scalars, frozen_models(algorithm), algorithm=algorithm,
            config=MODEL, micro_batches=micro_batches,
        )  # fmt: skip

    with jax.set_mesh(mesh):
        before = jax.device_get(toy_state(mesh))
        state, metrics = step(toy_state(mesh), batch, scalars)
        assert metrics["skipped_updates"] == 1.0 and np.isfinite(metrics["loss"]) != loss_is_bad
        assert int(state.step) == 1  # a batch was seen: the schedule goes on
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before.params)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.opt_state), before.opt_state)
        healthy = step_scalars(algorithm)
        state, metrics = step(state, host_batch(algorithm), healthy)
        assert metrics["skipped_updates"] == 0.0 and np.isfinite(metrics["loss"])
        fresh = toy_state(mesh).replace(step=np.int32(1))
        expected, _ = step(fresh, host_batch(algorithm), healthy)
        jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(found) for found in (state, expected)))


def test_a_healthy_update_is_that_of_the_plain_optimizer() -> None:
    """Bit for bit: the guard selects, it does not compute."""
    algorithm, mesh = ALGORITHMS["dpo"], one_device()
    batch, scalars = host_batch(algorithm), step_scalars(algorithm)

    @partial(jax.jit, compiler_options=training_options())
    def plain(state: TrainState, batch: Batch, scalars: StepScalars, frozen: Frozen) -> Any:
        def loss(params: Any) -> Any:
            total = algorithm.loss(Network(params, MODEL), batch, scalars.objective, frozen)[0]
            return total.total, total.count

        grads, count = jax.grad(loss, has_aux=True)(state.params)
        grads = jax.tree.map(lambda g: g / jnp.maximum(count, 1e-8), grads)
        optimizer = make_optimizer(scalars.optimizer, state.step)
        updates, _ = optimizer.update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates)

    frozen = frozen_models(algorithm)
    with jax.set_mesh(mesh):
        expected = jax.device_get(plain(toy_state(mesh), batch, scalars, frozen))
        state, metrics = train_step(toy_state(mesh), batch, scalars, frozen, algorithm=algorithm, config=MODEL)
    assert metrics["skipped_updates"] == 0.0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), expected)


@pytest.mark.parametrize("name", ["dpo", "grpo_token_mean"])
def test_numbers_never_recompile(name: str) -> None:
    whole(name)
    algorithm, mesh, base = ALGORITHMS[name], one_device(), step_scalars(ALGORITHMS[name])
    leaves, tree = jax.tree.flatten(base.optimizer)
    changes = [
        base._replace(optimizer=tree.unflatten([*leaves[:i], np.float32(0.3), *leaves[i + 1 :]]))
        for i in range(len(leaves))
    ]
    changes += [base._replace(objective={**base.objective, key: np.float32(0.3)}) for key in base.objective]
    with jax.set_mesh(mesh):
        state, losses = toy_state(mesh), []
        entries = []
        with compilations() as compiled:
            for scalars in changes:
                batch = to_device(mesh, host_batch(algorithm))
                state, metrics = train_step(
                    state, batch, scalars, frozen_models(algorithm), algorithm=algorithm, config=MODEL, micro_batches=1
                )
                losses.append(float(metrics["loss"]))
                entries.append(train_step._cache_size())
    assert "train_step" not in compiled
    assert entries[0] == entries[-1] and np.isfinite(losses).all()


def test_what_the_host_reads_shares_one_compiled_step_and_structure_does_not() -> None:
    assert RejectionSampling.loss is NextToken.loss  # so the tests above speak of it too
    assert RejectionSampling.prepare is NextToken.prepare
    assert DPO(pairs_per_prompt=1) == DPO(pairs_per_prompt=2) and DPO("ipo") != DPO()
    assert grpo(aggregation="constant") != grpo() and hash(grpo()) == hash(grpo())
    assert isinstance(ALGORITHMS["dpo"], DPO) and isinstance(ALGORITHMS["grpo_constant"], GRPO)


def test_toy_rows_are_uneven() -> None:
    """Guards the tests above: with equal rows a mean of means would pass too."""
    batch = host_batch(ALGORITHMS["next_token"])
    weights = row_weights(batch)
    tokens = (batch.loss_mask.sum(axis=1) * weights).reshape(2, 4).sum(axis=0)
    assert (weights == 0).sum() == 2 and tokens.max() > 5 * max(tokens.min(), 1e-9)
