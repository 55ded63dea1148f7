"""The optimizer against optax's own pieces, assembled another way, and against NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import base
from research.config.optimizers import ADAMW
from research.config.resolve import resolve
from research.core.optim import OptimizerScalars, init_optimizer, learning_rate_at, linear, make_optimizer
from research.train.build import optimizer_scalars as optimizer_of
from tests.research.algorithms.toy import optimizer_scalars

PARAMS = {"w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3), "norm": {"scale": np.ones(3, np.float32)}}


def gradients(step: int) -> dict:
    rng = np.random.default_rng(step)
    size = 10.0 if step % 2 else 0.05  # above and below the clip
    return jax.tree.map(lambda p: (size * rng.normal(size=p.shape)).astype(np.float32), PARAMS)


def rates(scalars: OptimizerScalars, steps: range) -> list[float]:
    return [float(learning_rate_at(jnp.int32(step), scalars)) for step in steps]


def test_equals_optax_adamw_with_clipping_and_its_schedule_step_by_step() -> None:
    s = optimizer_scalars(warmup_steps=3, decay_steps=12, end_fraction=0.2, eps=1e-8)
    decay = optax.cosine_decay_schedule(1e-2, 12 - 3, alpha=0.2)
    schedule = optax.join_schedules([lambda count: 1e-2 * (count + 1) / 3, decay], boundaries=[3])
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask={"w": True, "norm": {"scale": False}}),
    )
    ours_params = theirs_params = PARAMS
    ours_state, theirs_state = init_optimizer(PARAMS, ADAMW), theirs.init(PARAMS)

    @jax.jit
    def ours_update(state, params, grads, step, scalars):
        updates, state = make_optimizer(scalars, step).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for step in range(15):
        grads = gradients(step)
        ours_params, ours_state = ours_update(ours_state, ours_params, grads, jnp.int32(step), s)
        updates, theirs_state = theirs.update(grads, theirs_state, theirs_params)
        theirs_params = optax.apply_updates(theirs_params, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), ours_params, theirs_params)
    assert not np.allclose(ours_params["w"], PARAMS["w"], atol=1e-3)


def numpy_rate(step: int, peak: float, warmup: int, decay: int, end: float) -> float:
    """The schedule of one update, in plain Python."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if step >= max(decay, warmup + 1):
        return peak * end
    share_left = (1 + math.cos(math.pi * (step - warmup) / (decay - warmup))) / 2 if decay > warmup else 1.0
    return peak * (end + (1 - end) * share_left)


@pytest.mark.parametrize("end", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("warmup", "decay"), [(0, 1), (0, 7), (1, 1), (1, 2), (3, 12), (4, 4), (10, 5)])
def test_the_schedule_update_by_update(warmup: int, decay: int, end: float) -> None:
    s = optimizer_scalars(learning_rate=2.0, warmup_steps=warmup, decay_steps=decay, end_fraction=end)
    found = rates(s, range(decay + 3))
    expected = [numpy_rate(step, 2.0, warmup, decay, end) for step in range(decay + 3)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert min(found[:decay]) > 0  # no update is wasted, not even the last one with end_fraction 0
    if 0 < warmup <= decay:
        assert found[warmup - 1] == pytest.approx(2.0)


def test_the_decay_ends_after_the_last_update() -> None:
    s = optimizer_scalars(learning_rate=1.0, warmup_steps=0, decay_steps=4, end_fraction=0.0)
    root = math.sqrt(0.5)
    expected = [1, (1 + root) / 2, 0.5, (1 - root) / 2, 0, 0]
    np.testing.assert_allclose(rates(s, range(6)), expected, atol=1e-6)
    single = optimizer_scalars(learning_rate=1.0, warmup_steps=0, decay_steps=1, end_fraction=0.0)
    assert rates(single, range(1)) == [1.0]


def test_end_fraction_1_is_constant_and_no_warm_up_starts_at_the_peak() -> None:
    constant = optimizer_scalars(learning_rate=0.5, warmup_steps=0, decay_steps=10, end_fraction=1.0)
    assert rates(constant, range(12)) == pytest.approx([0.5] * 12)
    longer_warmup = optimizer_scalars(learning_rate=1.0, warmup_steps=10, decay_steps=5)
    assert rates(longer_warmup, range(5)) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_adam_by_hand_with_epsilon_outside_the_root() -> None:
    """Epsilon is as large as the root, so that inside it would give another number."""
    s = optimizer_scalars(learning_rate=0.1, warmup_steps=0, end_fraction=1.0, eps=0.5, weight_decay=0.0, clip_norm=1e9)
    params, state = {"w": jnp.array([1.0, -2.0])}, init_optimizer({"w": jnp.zeros(2)}, ADAMW)
    x, m, v = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    for step, g in enumerate([np.array([0.3, -0.1]), np.array([0.2, 0.4])]):
        updates, state = make_optimizer(s, jnp.int32(step)).update({"w": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, updates)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.95 ** (step + 1))
        x = x - 0.1 * m_hat / (np.sqrt(v_hat) + 0.5)
    np.testing.assert_allclose(params["w"], x, rtol=1e-5)


def test_weight_decay_spares_norm_scales_even_stacked_ones() -> None:
    s = optimizer_scalars(learning_rate=0.1, warmup_steps=0, end_fraction=1.0, weight_decay=0.5)
    params = {"layers": {"norm": {"scale": jnp.ones((2, 3))}, "w": jnp.ones((2, 3, 3))}, "embed": jnp.ones((4, 3))}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = make_optimizer(s, jnp.int32(0)).update(zeros, init_optimizer(params, ADAMW), params)
    assert not np.any(updates["layers"]["norm"]["scale"])
    for decayed in (updates["layers"]["w"], updates["embed"]):
        np.testing.assert_allclose(decayed, -0.05, rtol=1e-6)


def test_clipping_is_by_the_global_norm() -> None:
    s = optimizer_scalars(clip_norm=1.0)
    grads = {"w": jnp.full((2, 3), 3.0), "norm": {"scale": jnp.full(3, 4.0)}}
    _, state = make_optimizer(s, jnp.int32(0)).update(grads, init_optimizer(PARAMS, ADAMW), PARAMS)
    norm = np.sqrt(6 * 9 + 3 * 16)
    np.testing.assert_allclose(state[1][0].mu["w"], 0.1 * 3.0 / norm, rtol=1e-5)
    np.testing.assert_allclose(state[1][0].mu["norm"]["scale"], 0.1 * 4.0 / norm, rtol=1e-5)


def test_sgd_is_optax_sgd() -> None:
    stage = resolve(base.get_config(), ("rl.optimizer.name=sgd", "rl.optimizer.sgd.momentum=0.9")).stage("rl")
    s = optimizer_of(stage).replace(clip_norm=np.float32(1e9))
    theirs = optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.1, mask={"w": True, "norm": {"scale": False}}))
    ours_state, theirs_state = init_optimizer(PARAMS, s.rule), theirs.init(PARAMS)
    for step in range(3):
        rate = float(learning_rate_at(jnp.int32(step), s))
        ours, ours_state = make_optimizer(s, jnp.int32(step)).update(gradients(step), ours_state, PARAMS)
        expected, theirs_state = theirs.update(gradients(step), theirs_state, PARAMS)
        jax.tree.map(lambda a, b, rate=rate: np.testing.assert_allclose(a, -rate * b, rtol=1e-5), ours, expected)


@pytest.mark.parametrize("done", [0.0, 0.25, 0.5, 1.0])
def test_a_linear_decay_is_a_line_to_its_end(done: float) -> None:
    found = float(linear({"end_fraction": 0.2}, jnp.float32(done)))
    assert found == pytest.approx(1.0 - 0.8 * done, rel=1e-6)
