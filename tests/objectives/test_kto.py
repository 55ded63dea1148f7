"""KTO against explicit loops, the sides of its reference point, and subset metrics."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.kto import kto_loss, kto_reference_point
from objectives.reduce import reduce_metrics
from tests.objectives.cases import SEEDS, random_logps

jit_loss = functools.partial(jax.jit, static_argnames=("loss_type",))(kto_loss)
jit_point = jax.jit(kto_reference_point)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_golden(loss_type):
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        batch = [6, 1][seed % 2]
        policy, ref = (random_logps(rng, batch) * 5 for _ in range(2))
        desirable = rng.random(batch) < [0.5, 0.0, 1.0][seed % 3]
        beta, good, bad = rng.uniform(0.05, 1), rng.uniform(0.5, 2), rng.uniform(0.5, 2)
        z = 0.0 if loss_type != "kto" else [rng.uniform(0, 3), rng.uniform(0, 3, batch)][seed % 4 == 0]
        call = jit_loss if loss_type == "kto" else kto_loss
        got = call(
            policy_logps=policy,
            ref_logps=ref,
            desirable=desirable,
            reference_point=jnp.float32(z) if loss_type == "kto" else 0.0,
            beta=float(beta),
            desirable_weight=float(good),
            undesirable_weight=float(bad),
            loss_type=loss_type,
        )
        means = {True: [], False: []}
        for b in range(batch):
            x, point = float(policy[b]) - float(ref[b]), float(np.broadcast_to(z, batch)[b])
            value = sigmoid(beta * (x - point)) if desirable[b] else sigmoid(beta * (point - x))
            expected = (good if desirable[b] else bad) * (1 - value)
            np.testing.assert_allclose(got.losses[b], expected, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}")
            np.testing.assert_allclose(got.metrics["rewards"][b], beta * x, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(got.metrics["kl"][b], point, rtol=1e-5, atol=1e-5)
            right = x > point if desirable[b] else x < point
            means[bool(desirable[b])].append((beta * x, float(policy[b]), float(right)))
        reduced = reduce_metrics(got.metrics)
        for label, rows in means.items():
            for i, name in enumerate(("rewards", "logps", "accuracy")):
                metric = reduced[f"{name}_{'desirable' if label else 'undesirable'}"]
                assert float(metric.count) == len(rows)
                average = sum(row[i] for row in rows) / max(len(rows), 1)
                np.testing.assert_allclose(metric.mean(), average, rtol=1e-5, atol=1e-5, err_msg=name)


def test_reference_point_golden():
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        batch = [6, 1][seed % 2]
        policy, ref = (random_logps(rng, batch) * 5 for _ in range(2))
        weights = rng.choice([0.0, 1.0, 2.0], batch).astype(np.float32) if seed % 3 else None
        if weights is not None:
            policy[weights == 0] = np.nan
        total = count = 0.0
        for b in range(batch):
            weight = 1.0 if weights is None else float(weights[b])
            if weight:
                total, count = total + weight * (float(policy[b]) - float(ref[b])), count + weight
        expected = max(0.0, total / count) if count else 0.0
        got = jit_point(policy_kl_logps=policy, ref_kl_logps=ref, weights=weights)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}")


def test_the_reference_point_is_never_negative_and_has_no_gradient():
    def point(policy):
        return kto_reference_point(policy_kl_logps=policy, ref_kl_logps=jnp.array([-3.0, -1.0]))

    assert float(point(jnp.array([-9.0, -1.0]))) == 0.0
    value, gradient = jax.value_and_grad(point)(jnp.array([-1.0, -1.0]))
    assert float(value) == 1.0 and not np.any(gradient)


def gradient_at(gain, desirable, **options):
    def loss(policy, point):
        output = kto_loss(
            policy_logps=policy,
            ref_logps=jnp.zeros(1),
            desirable=jnp.array([desirable]),
            reference_point=point,
            beta=0.5,
            **options,
        )
        return output.losses[0]

    return jax.value_and_grad(loss, (0, 1))(jnp.array([2.0 + gain]), jnp.float32(2.0))


def test_at_the_reference_point_a_row_costs_half_its_weight_and_moves_to_its_side():
    for desirable, sign, weight in ((True, -1, 3.0), (False, 1, 0.5)):
        options = {"desirable_weight": 3.0, "undesirable_weight": 0.5}
        value, (gradient, point_gradient) = gradient_at(0.0, desirable, **options)
        np.testing.assert_allclose(value, weight / 2, rtol=1e-6)
        np.testing.assert_allclose(gradient, [sign * weight * 0.5 / 4], rtol=1e-6)
        assert float(point_gradient) == 0.0


def test_swapping_the_label_mirrors_the_loss():
    for gain in (-3.0, 0.7, 5.0):
        (good, (up, _)), (bad, (down, _)) = gradient_at(gain, True), gradient_at(gain, False)
        np.testing.assert_allclose(good + bad, 1.0, rtol=1e-6)
        np.testing.assert_allclose(up, -down, rtol=1e-5)


def test_the_loss_saturates_on_both_sides():
    for gain in (-200.0, 200.0):
        value, (gradient, _) = gradient_at(gain, True)
        np.testing.assert_allclose(value, float(gain < 0), atol=1e-6)
        np.testing.assert_allclose(gradient, [0.0], atol=1e-6)


def test_the_unpaired_zero_anchor_is_kto_with_z_0():
    arrays = {"policy_logps": jnp.array([-1.0, -4.0]), "ref_logps": jnp.array([-2.0, -2.0])}
    arrays |= {"desirable": jnp.array([True, False]), "reference_point": 0.0, "beta": 0.3}
    anchored = kto_loss(**arrays, loss_type="apo_zero_unpaired")
    np.testing.assert_array_equal(anchored.losses, kto_loss(**arrays).losses)


def test_the_mean_of_a_missing_label_is_0_of_0_rows():
    arrays = {"policy_logps": jnp.array([-1.0]), "ref_logps": jnp.zeros(1), "desirable": jnp.array([True])}
    reduced = reduce_metrics(kto_loss(**arrays, reference_point=0.0, beta=1.0).metrics)
    assert [float(x) for x in reduced["rewards_undesirable"]] == [0.0, 0.0]
    assert [float(x) for x in reduced["rewards_desirable"]] == [-1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "bco"}, "loss_type: got 'bco', expected one of kto, apo_zero_unpaired"),
        (
            {"loss_type": "apo_zero_unpaired"},
            "reference_point: given, but it would have no effect with loss_type 'apo_zero_unpaired'",
        ),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        gradient_at(0.0, True, **options)


def test_float_labels_are_refused():
    with pytest.raises(TypeError, match="expected bool"):
        kto_loss(
            policy_logps=jnp.zeros(2), ref_logps=jnp.zeros(2), desirable=jnp.ones(2), reference_point=0.0, beta=1.0
        )
