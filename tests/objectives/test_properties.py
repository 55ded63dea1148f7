"""What every objective must satisfy. A new objective adds one `Case` to a table and gets all of these tests.

Compiling is nearly all of the time, so a case is compiled once for each shape (full, padded, two rows) and
placement; the tests read the same compiled evaluation.
"""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from objectives.reduce import example_mean, reduce, reduce_metrics
from tests.objectives import case_table_prefs, case_table_rl
from tests.objectives.case import EXAMPLE, MASK, B, T
from tests.objectives.cases import GARBAGE

CASES = case_table_prefs.CASES | case_table_rl.CASES
MASKED = [name for name, case in CASES.items() if case.masks]
UNCOUPLED = [name for name, case in CASES.items() if not case.coupled]
TRACES = Counter()


def is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def is_per_token(x):
    return x.ndim >= 2 and x.shape[:2] == (B, T)


def fill_masked(x, filler):
    """The masked slots overwritten: floats by `filler`, or by NaN and infinities; others by 99 or True."""
    padding = np.full(x.shape, 0 if filler != "garbage" else 99).astype(x.dtype)
    if is_float(x):
        padding = np.resize(GARBAGE, x.shape) if filler == "garbage" else np.float32(filler)
    return np.where(MASK.reshape(B, T, *[1] * (x.ndim - 2)), x, padding)


def make_inputs(name, filler=0.0):
    """The case's arrays, its mask (None if it takes none), row weights of one, and its scalars."""
    case = CASES[name]
    arrays = case.arrays(np.random.default_rng(3))
    if case.masks:
        arrays = {key: fill_masked(x, filler) if is_per_token(x) else x for key, x in arrays.items()}
    return arrays, MASK if case.masks else None, np.ones(B, np.float32), case.scalars


def call(name, arrays, mask, weights, scalars):
    case = CASES[name]
    extra = dict.fromkeys(case.masks, mask) | ({case.weights: weights} if case.weights else {})
    return case.loss(**arrays, **extra, **scalars, **case.options)


def losses_by_aggregation(name, output, mask, weights):
    if CASES[name].aggregations == EXAMPLE:
        return {EXAMPLE[0]: example_mean(output.losses, weights)}
    return {
        how: reduce(output.losses, mask, aggregation=how, max_length=9.0, weights=weights)
        for how in CASES[name].aggregations
    }


def evaluate(name, arrays, mask, weights, scalars):
    """The output, its sums, and gradients for every float array.

    The gradients of the loss totals have a leading axis, one slice for each aggregation.
    """
    TRACES[name] += 1
    variables = {key: x for key, x in arrays.items() if is_float(x)}

    def totals(variables):
        output = call(name, arrays | variables, mask, weights, scalars)
        metrics = reduce_metrics(output.metrics, mask=mask, weights=weights)
        losses = losses_by_aggregation(name, output, mask, weights)
        return jnp.stack([loss.total for loss in losses.values()]), (output, losses, metrics)

    def metric_total(variables):
        return sum((metric.total for metric in totals(variables)[1][2].values()), jnp.zeros(()))

    gradients, (output, losses, metrics) = jax.jacrev(totals, has_aux=True)(variables)
    return {
        "output": output,
        "sums": (losses, metrics),
        "gradients": gradients,
        "metric_gradients": jax.grad(metric_total)(variables),
    }


jit_evaluate = jax.jit(evaluate, static_argnums=0)


@functools.cache
def base(name):
    return jax.device_get(jit_evaluate(name, *make_inputs(name)))


def assert_close(got, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=rtol, atol=atol), got, expected)


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_unreduced_float32(name):
    output = base(name)["output"]
    assert output.losses.shape == ((B,) if CASES[name].aggregations == EXAMPLE else (B, T))
    for leaf in jax.tree.leaves(output):
        assert leaf.dtype == np.float32 and leaf.shape in {(B,), (B, T)} and np.all(np.isfinite(leaf))


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_inputs_give_float32_outputs_near_the_exact_ones(name):
    arrays, *rest = make_inputs(name)
    arrays = {key: jnp.asarray(x, jnp.bfloat16) if is_float(x) else x for key, x in arrays.items()}
    output = call(name, arrays, *rest)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(output))
    np.testing.assert_allclose(output.losses, base(name)["output"].losses, atol=0.2)


@pytest.mark.parametrize("name", CASES)
def test_gradients_flow_where_documented_and_nowhere_else(name):
    result = base(name)
    assert {key for key, g in result["gradients"].items() if np.any(g)} == CASES[name].differentiable
    assert not any(np.any(g) for g in result["metric_gradients"].values())


@pytest.mark.parametrize("name", CASES)
def test_gradients_pass_check_grads(name):
    """Forwards and backwards, for every aggregation at once."""
    arrays, mask, weights, scalars = make_inputs(name)
    constants = {key: x for key, x in arrays.items() if key not in CASES[name].differentiable}

    def totals(variables):
        losses = losses_by_aggregation(name, call(name, variables | constants, mask, weights, scalars), mask, weights)
        return jnp.stack([loss.total for loss in losses.values()])

    variables = {key: jnp.asarray(arrays[key]) for key in CASES[name].differentiable}
    check_grads(jax.jit(totals), (variables,), order=1, modes=("fwd", "rev"), atol=5e-3, rtol=5e-3, eps=1e-2)


@pytest.mark.parametrize("name", CASES)
def test_jit_changes_nothing(name):
    inputs = make_inputs(name, "garbage")  # XLA compiles `mask * x` to a select: only eager shows a NaN leaking
    got, expected = evaluate(name, *inputs), jit_evaluate(name, *inputs)
    for key in ("sums", "gradients"):
        assert_close(got[key], expected[key])


@pytest.mark.parametrize("name", MASKED)
def test_garbage_in_masked_slots_reaches_neither_value_nor_gradient(name):
    dirty = jit_evaluate(name, *make_inputs(name, "garbage"))
    for key in ("output", "sums", "gradients"):
        jax.tree.map(np.testing.assert_array_equal, dirty[key], base(name)[key])
    losses = dirty["output"].losses
    assert losses.ndim == 1 or not np.any(losses[~MASK]), "a loss in a masked slot"


@pytest.mark.parametrize("name", CASES)
def test_padding_changes_nothing(name):
    """More columns on either side, and rows of weight 0."""
    arrays, mask, weights, scalars = make_inputs(name)

    def pad(x, filler):
        widths = [(0, 2)] + [(1, 3) if is_per_token(x) else (0, 0)] * (x.ndim > 1) + [(0, 0)] * (x.ndim - 2)
        return np.pad(x, widths, constant_values=filler)

    # with a mask the padding is NaN; a padded pair is a sum over no tokens, 0
    float_filler = np.nan if mask is not None else 0.0
    padded = {key: pad(x, float_filler if is_float(x) else 0) for key, x in arrays.items()}
    padded_mask = None if mask is None else pad(mask, False)
    got, expected = jit_evaluate(name, padded, padded_mask, pad(weights, 0.0), scalars), base(name)
    assert_close(got["sums"], expected["sums"])
    for key, gradient in got["gradients"].items():
        inside = np.s_[:, :B, 1 : T + 1] if is_per_token(arrays[key]) else np.s_[:, :B]
        assert_close(gradient[inside], expected["gradients"][key])
        np.testing.assert_array_equal(gradient.at[inside].set(0.0), jnp.zeros_like(gradient))


@pytest.mark.parametrize("name", UNCOUPLED)
def test_micro_batches_add_up_to_the_full_batch(name):
    *inputs, scalars = make_inputs(name)
    parts = []
    for start in range(0, B, 2):  # 7, 4, 9 and 7 tokens
        rows = jax.tree.map(lambda x, start=start: x[start : start + 2], inputs)
        parts.append(jit_evaluate(name, *rows, scalars))
    assert_close(jax.tree.map(lambda *leaves: sum(leaves), *(part["sums"] for part in parts)), base(name)["sums"])
    gradients = [part["gradients"] for part in parts]
    gradients = jax.tree.map(lambda *leaves: np.concatenate(leaves, 1), *gradients)
    assert_close(gradients, base(name)["gradients"])


@pytest.mark.parametrize("name", CASES)
def test_eight_devices_equal_one(name):
    assert jax.device_count() == 8
    *inputs, scalars = make_inputs(name)
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    got = jit_evaluate(name, *jax.device_put(inputs, sharding), scalars)
    for key in ("sums", "gradients"):
        assert_close(got[key], base(name)[key])
    assert all(len(g.sharding.device_set) == 8 for g in got["gradients"].values())


@pytest.mark.parametrize("name", CASES)
def test_a_sweep_over_scalars_compiles_once(name):
    *inputs, scalars = make_inputs(name)

    def mean(**changed):
        losses = jit_evaluate(name, *inputs, scalars | changed)["sums"][0]
        return float(next(iter(losses.values())).mean())

    unchanged = mean()
    traces = TRACES[name]
    for key, value in scalars.items():
        assert mean(**{key: value * 0.5}) != unchanged, f"{key} has no effect"
        if key not in CASES[name].positive:
            assert np.isfinite(mean(**{key: 0.0}))
    assert TRACES[name] == traces
