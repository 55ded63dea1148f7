"""What every objective must satisfy. A new objective adds one `Case` and gets all of these tests."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from objectives.dpo import dpo_loss
from objectives.grpo import grpo_loss
from objectives.next_token import next_token_loss
from objectives.reduce import example_mean, reduce, reduce_metrics
from tests.objectives.cases import fill, random_logps

B, T = 8, 6
LENGTHS = [6, 1, 4, 0, 3, 6, 2, 5]  # uneven; one row truncated away, one of a single token


class Case(NamedTuple):
    loss: Callable
    differentiable: set[str]
    arrays: Callable[[np.random.Generator], dict[str, np.ndarray]]
    scalars: dict[str, float]
    aggregations: tuple[str, ...] = ("token_mean", "sequence_mean", "constant")
    options: dict[str, str] = {}


def next_token_arrays(rng):
    return {name: random_logps(rng, B, T) for name in ("token_logps", "mean_logps", "logsumexp")}


def grpo_arrays(rng):
    old = random_logps(rng, B, T)
    # ratios well inside, below and above the clip, so that finite differences do not straddle a kink
    gaps = {"policy_logps": [-0.5, -0.1, 0.05, 0.5], "ref_logps": [-0.3, 0.2]}
    near = {name: old + rng.choice(gap, (B, T)).astype(np.float32) for name, gap in gaps.items()}
    return {"old_logps": old, "advantages": rng.normal(size=B).astype(np.float32), **near}


def dpo_arrays(rng):
    names = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    return {name: random_logps(rng, B) * 5 for name in names}


GRPO_SCALARS = {"clip_eps_low": 0.2, "clip_eps_high": 0.28, "beta": 0.3}
CASES = {
    "next_token": Case(
        next_token_loss,
        {"token_logps", "mean_logps", "logsumexp"},
        next_token_arrays,
        {"label_smoothing": 0.1, "z_loss_coef": 0.05},
    ),
    "grpo_k3": Case(grpo_loss, {"policy_logps"}, grpo_arrays, GRPO_SCALARS, options={"kl_estimator": "k3"}),
    "grpo_k2": Case(
        grpo_loss, {"policy_logps"}, grpo_arrays, GRPO_SCALARS, ("token_mean",), {"kl_estimator": "k2"}
    ),
    "dpo": Case(
        dpo_loss,
        {"policy_chosen_logps", "policy_rejected_logps"},
        dpo_arrays,
        {"beta": 0.3, "label_smoothing": 0.1},
        aggregations=("example_mean",),
    ),
}
MASK_NAMES = {"next_token": "mask", "grpo_k3": "completion_mask", "grpo_k2": "completion_mask"}
TOKEN_CASES = sorted(MASK_NAMES)


def make_inputs(name, filler=0.0):
    """The case's arrays, its mask (None if it is per example) and row weights of one."""
    arrays = CASES[name].arrays(np.random.default_rng(3))
    mask = np.arange(T) < np.array(LENGTHS)[:, None] if name in MASK_NAMES else None
    if mask is not None:
        arrays = {key: fill(x, mask, filler) if x.ndim == 2 else x for key, x in arrays.items()}
    return arrays, mask, np.ones(B, np.float32)


def call(name, arrays, mask, scalars):
    masks = {MASK_NAMES[name]: mask} if mask is not None else {}
    return CASES[name].loss(**arrays, **masks, **scalars, **CASES[name].options)


def sums(name, aggregation, arrays, mask, weights, scalars):
    """The reduced loss and the reduced metrics."""
    output = call(name, arrays, mask, scalars)
    if mask is None:
        loss = example_mean(output.losses, weights)
    else:
        loss = reduce(output.losses, mask, aggregation=aggregation, max_length=9.0, weights=weights)
    return loss, reduce_metrics(output.metrics, mask=mask, weights=weights)


def evaluate(name, arrays, mask, weights):
    """By aggregation: the sums (loss, metrics), and the gradient of the loss's total for every array."""

    def total(arrays, aggregation):
        loss, metrics = sums(name, aggregation, arrays, mask, weights, CASES[name].scalars)
        return loss.total, (loss, metrics)

    results = {key: jax.grad(total, has_aux=True)(arrays, key) for key in CASES[name].aggregations}
    return {key: (output, gradient) for key, (gradient, output) in results.items()}


jit_evaluate = jax.jit(evaluate, static_argnums=0)


def assert_close(got, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=rtol, atol=atol), got, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_unreduced_float32(name, dtype):
    arrays, mask, _ = make_inputs(name)
    exact = call(name, arrays, mask, CASES[name].scalars)
    output = call(name, jax.tree.map(lambda x: jnp.asarray(x, dtype), arrays), mask, CASES[name].scalars)
    assert output.losses.shape == ((B,) if mask is None else (B, T))
    for leaf in jax.tree.leaves(output):
        assert leaf.dtype == jnp.float32 and leaf.shape in {(B,), (B, T)} and np.all(np.isfinite(leaf))
    np.testing.assert_allclose(output.losses, exact.losses, atol=0.0 if dtype == jnp.float32 else 0.2)


@pytest.mark.parametrize("name", CASES)
def test_gradients_flow_where_documented_and_nowhere_else(name):
    arrays, mask, _ = make_inputs(name)
    scalars = CASES[name].scalars
    gradient = jax.jit(jax.grad(lambda a: call(name, a, mask, scalars).losses.sum()))(arrays)
    assert {key for key, g in gradient.items() if np.any(g)} == CASES[name].differentiable
    metrics = jax.jit(
        jax.grad(lambda a: sum(jax.tree.map(jnp.sum, call(name, a, mask, scalars).metrics).values()))
    )
    assert not any(np.any(g) for g in metrics(arrays).values())


@pytest.mark.parametrize("name", CASES)
def test_check_grads(name):
    arrays, mask, weights = make_inputs(name)
    constants = {key: x for key, x in arrays.items() if key not in CASES[name].differentiable}

    def mean(variables):
        aggregation = CASES[name].aggregations[0]
        return sums(name, aggregation, variables | constants, mask, weights, CASES[name].scalars)[0].mean()

    variables = {key: jnp.asarray(arrays[key]) for key in CASES[name].differentiable}
    check_grads(jax.jit(mean), (variables,), order=1, modes=("fwd", "rev"), atol=5e-3, rtol=5e-3, eps=1e-2)


@pytest.mark.parametrize("name", CASES)
def test_jit_changes_nothing(name):
    inputs = make_inputs(
        name, "garbage"
    )  # XLA compiles `mask * x` to a select: only eager shows a NaN leaking
    assert_close(jit_evaluate(name, *inputs), evaluate(name, *inputs))


@pytest.mark.parametrize("name", TOKEN_CASES)
def test_garbage_in_masked_slots_reaches_neither_value_nor_gradient(name):
    clean, dirty = (jit_evaluate(name, *make_inputs(name, filler)) for filler in (0.0, "garbage"))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


@pytest.mark.parametrize("name", CASES)
def test_padding_changes_nothing(name):
    """More columns on either side, and rows of weight 0."""
    arrays, mask, weights = make_inputs(name)

    def pad(x, filler):
        widths = [(0, 2), (1, 3)][: x.ndim]
        return np.pad(x, widths, constant_values=filler)

    # per token the padding is NaN; a padded pair is a sum over no tokens, 0
    padded = {key: pad(x, np.nan if mask is not None else 0.0) for key, x in arrays.items()}
    padded_mask = None if mask is None else pad(mask, False)
    got = jit_evaluate(name, padded, padded_mask, pad(weights, 0.0))
    for aggregation, (expected_sums, expected_gradient) in jit_evaluate(name, arrays, mask, weights).items():
        got_sums, gradient = got[aggregation]
        assert_close(got_sums, expected_sums)
        for key, g in gradient.items():
            inside = (slice(0, B), slice(1, T + 1))[: g.ndim]
            assert_close(g[inside], expected_gradient[key])
            np.testing.assert_array_equal(g.at[inside].set(0.0), jnp.zeros_like(g))


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_add_up_to_the_full_batch(name):
    inputs = make_inputs(name)
    parts = []
    for start in range(0, B, 2):  # 7, 4, 9 and 7 tokens
        parts.append(
            jit_evaluate(name, *jax.tree.map(lambda x, rows=slice(start, start + 2): x[rows], inputs))
        )
    for aggregation, (expected_sums, gradient) in jit_evaluate(name, *inputs).items():
        part_sums, part_gradients = zip(*(part[aggregation] for part in parts), strict=True)
        assert_close(jax.tree.map(lambda *leaves: sum(leaves), *part_sums), expected_sums)
        assert_close(jax.tree.map(lambda *leaves: np.concatenate(leaves), *part_gradients), gradient)


@pytest.mark.parametrize("name", CASES)
def test_eight_devices_equal_one(name):
    assert jax.device_count() == 8
    inputs = make_inputs(name)
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    sharded = jax.device_put(inputs, sharding)
    got = jit_evaluate(name, *sharded)
    assert_close(got, jit_evaluate(name, *inputs))
    for _, gradient in got.values():
        assert all(len(g.sharding.device_set) == 8 for g in gradient.values())


@pytest.mark.parametrize("name", CASES)
def test_a_sweep_over_scalars_compiles_once(name):
    arrays, mask, weights = make_inputs(name)
    traces = []

    @jax.jit
    def mean(scalars):
        traces.append(scalars)
        return sums(name, CASES[name].aggregations[0], arrays, mask, weights, scalars)[0].mean()

    scalars = CASES[name].scalars
    base = mean(scalars)
    for key, value in scalars.items():
        assert float(mean(scalars | {key: value * 0.5})) != float(base), f"{key} has no effect"
        assert np.isfinite(mean(scalars | {key: 0.0}))
    assert len(traces) == 1
