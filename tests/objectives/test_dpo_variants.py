"""Every loss and divergence of DPO against loops over Python floats, their limits and their refusals."""

import functools
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.dpo import READ_BY, DPOLossType, dpo_loss
from tests.objectives.cases import SEEDS, random_logps

NAMES = ["policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps"]
METRICS = {"rewards_chosen", "rewards_rejected", "reward_margin", "reward_accuracy", "logps_chosen", "logps_rejected"}
jit_loss = functools.partial(jax.jit, static_argnames=("loss_type", "f_divergence"))(dpo_loss)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > -30 else x


def sigmoid(x):
    return math.exp(log_sigmoid(x))


def cdpo(margin, e):
    return -(1 - e) * log_sigmoid(margin) - e * log_sigmoid(-margin)


def score(x, divergence, a):
    """The derivative of each f at `t = exp(x)`, up to its value at t = 1."""
    t = math.exp(x)
    if divergence == "forward_kl":
        return 1 - 1 / t
    if divergence == "js":
        return math.log(2 * t / (1 + t))
    if divergence == "alpha" and a != 1:
        return (t ** (a - 1) - 1) / (a - 1)
    return x


def loop_dpo(loss_type, logps, beta, e, delta, tau, lengths, weights, divergence, a):
    pc, pr, rc, rr = (row.astype(float) for row in logps)
    batch, out = len(pc), []
    real = [b for b in range(batch) if weights is None or weights[b] > 0]
    for b in range(batch):
        if loss_type.startswith("aot"):
            if b not in real:
                out.append(None)
                continue
            u = {i: (pc[i] - pr[i] if loss_type == "aot" else pc[i] - rc[i]) for i in real}
            v = sorted((rc[i] - rr[i]) if loss_type == "aot" else (pr[i] - rr[i]) for i in real)
            out.append(cdpo(beta * (u[b] - v[sorted(u.values()).index(u[b])]), e))
            continue
        xc, xr = pc[b] - rc[b], pr[b] - rr[b]
        yc, yr = score(xc, divergence, a), score(xr, divergence, a)
        if loss_type in ("ipo", "sigmoid_norm"):
            yc, yr = yc / lengths[0][b], yr / lengths[1][b]
        d = yc - yr
        q = sigmoid(beta * d)
        out.append(
            {
                "sigmoid": lambda d=d: cdpo(beta * d, e),
                "sigmoid_norm": lambda d=d: cdpo(beta * d, e),
                "hinge": lambda d=d: max(0.0, 1 - beta * d),
                "ipo": lambda d=d: (d - 1 / (2 * beta)) ** 2,
                "ipo_unnormalized": lambda d=d: (d - 1 / (2 * beta)) ** 2,
                "robust": lambda d=d: (-(1 - e) * log_sigmoid(beta * d) + e * log_sigmoid(-beta * d)) / (1 - 2 * e),
                "exo_pair": lambda q=q: q * math.log(q / (1 - e)) + (1 - q) * (math.log1p(-q) - math.log(e)),
                "nca_pair": lambda c=xc, r=xr: (
                    -log_sigmoid(beta * c) - 0.5 * log_sigmoid(-beta * c) - 0.5 * log_sigmoid(-beta * r)
                ),
                "bco_pair": lambda c=xc, r=xr: -log_sigmoid(beta * c - delta) - log_sigmoid(-(beta * r - delta)),
                "sppo_hard": lambda c=xc, r=xr: (c - 1 / (2 * beta)) ** 2 + (r + 1 / (2 * beta)) ** 2,
                "apo_zero": lambda c=xc, r=xr: 1 - sigmoid(beta * c) + sigmoid(beta * r),
                "apo_down": lambda c=xc, r=xr: sigmoid(beta * c) + 1 - sigmoid(beta * (c - r)),
                "discopop": lambda d=d: (
                    -(1 - sigmoid(beta * d / tau)) * log_sigmoid(beta * d)
                    + sigmoid(beta * d / tau) * math.exp(-beta * d)
                ),
            }[loss_type]()
        )
    return out


def random_case(seed, scale=4.0):
    rng = np.random.default_rng(seed)
    batch = [5, 1][seed % 2]
    logps = [random_logps(rng, batch) * scale for _ in NAMES]
    if seed % 5 == 0:
        logps[1], logps[3] = logps[0], logps[2]  # tie
    if seed % 7 == 0:
        logps[2], logps[3] = logps[0], logps[1]  # at the reference
    lengths = rng.integers(1, 9, (2, batch)).astype(np.float32)
    weights = rng.choice([0.0, 1.0, 1.0], batch).astype(np.float32)
    return rng, logps, lengths, weights


@pytest.mark.parametrize("loss_type", get_args(DPOLossType))
def test_golden(loss_type):
    for seed in SEEDS:
        rng, logps, lengths, weights = random_case(seed)
        beta, delta, tau = (float(rng.uniform(*r)) for r in ((0.1, 1.0), (-1, 1), (0.05, 0.5)))
        e = [0.1, 0.4, 0.01][seed % 3]
        available = {
            "label_smoothing": jnp.float32(e),
            "bco_delta": delta,
            "discopop_tau": tau,
            "chosen_lengths": lengths[0],
            "rejected_lengths": lengths[1],
            "weights": weights,
        }
        options = {name: x for name, x in available.items() if loss_type in READ_BY[name]}
        got = jit_loss(**dict(zip(NAMES, logps, strict=True)), beta=beta, loss_type=loss_type, **options)
        expected = loop_dpo(loss_type, logps, beta, e, delta, tau, lengths, weights, "reverse_kl", None)
        for b, value in enumerate(expected):
            if value is not None:
                np.testing.assert_allclose(got.losses[b], value, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}")
        assert set(got.metrics) == METRICS
        margins = beta * ((logps[0] - logps[2]) - (logps[1] - logps[3]))
        np.testing.assert_allclose(got.metrics["reward_margin"], margins, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_divergence_golden(divergence, loss_type):
    for seed in SEEDS:
        rng, logps, lengths, _ = random_case(seed, scale=1.5)
        beta, a = float(rng.uniform(0.1, 1)), [0.0, 0.5, 1.0, 2.0][seed % 4]
        options = {"alpha_divergence_coef": a} if divergence == "alpha" else {}
        if loss_type == "ipo":
            options |= {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        arrays = dict(zip(NAMES, logps, strict=True))
        got = jit_loss(**arrays, beta=beta, loss_type=loss_type, f_divergence=divergence, **options)
        expected = loop_dpo(loss_type, logps, beta, 0.0, 0, 1, lengths, None, divergence, a)
        np.testing.assert_allclose(got.losses, expected, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}")


def test_nll_and_pair_weights_golden():
    for seed in SEEDS:
        rng, logps, lengths, pair_weights = random_case(seed)
        beta, alpha = float(rng.uniform(0.1, 1)), float(rng.uniform(0.1, 2))
        got = jit_loss(
            **dict(zip(NAMES, logps, strict=True)),
            beta=beta,
            rpo_alpha=alpha,
            chosen_lengths=lengths[0],
            pair_weights=pair_weights * 0.7,
        )
        contrast = loop_dpo("sigmoid", logps, beta, 0.0, 0, 1, None, None, "reverse_kl", None)
        for b, value in enumerate(contrast):
            expected = 0.7 * float(pair_weights[b]) * value - alpha * float(logps[0][b]) / lengths[0][b]
            np.testing.assert_allclose(got.losses[b], expected, rtol=1e-5, atol=1e-5)


AT_REFERENCE = {  # value, d/d chosen, d/d rejected, all for beta = 0.5
    "sigmoid": (math.log(2), -0.25, 0.25),
    "hinge": (1.0, -0.5, 0.5),
    "ipo_unnormalized": (1.0, -2.0, 2.0),
    "robust": (math.log(2), -0.25, 0.25),
    "nca_pair": (2 * math.log(2), -0.125, 0.125),
    "bco_pair": (2 * math.log(2), -0.25, 0.25),
    "sppo_hard": (2.0, -2.0, 2.0),
    "aot": (math.log(2), -0.25, 0.25),
    "aot_unpaired": (math.log(2), -0.25, 0.25),
    "apo_zero": (1.0, -0.125, 0.125),
    "apo_down": (1.0, 0.0, 0.125),
    # the blend with tau 0.05 is not monotone: at a tie it pushes the *wrong* way, as published
    "discopop": (0.5 * math.log(2) + 0.5, 0.5 * (5 * (1 - math.log(2)) - 0.75), -0.5 * (5 * (1 - math.log(2)) - 0.75)),
}


def value_and_gradients(loss_type, chosen, rejected, ref_chosen, ref_rejected, **options):
    def total(chosen, rejected):
        arrays = dict(zip(NAMES, [chosen, rejected, ref_chosen, ref_rejected], strict=True))
        return dpo_loss(**arrays, loss_type=loss_type, **({"beta": 0.5} | options)).losses.sum()

    return jax.jit(jax.value_and_grad(total, (0, 1)))(chosen, rejected)


@pytest.mark.parametrize("loss_type", AT_REFERENCE)
def test_at_the_reference(loss_type):
    one = jnp.ones(1)
    value, gradients = value_and_gradients(loss_type, -3 * one, -7 * one, -3 * one, -7 * one)
    np.testing.assert_allclose([value, *np.ravel(gradients)], AT_REFERENCE[loss_type], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_every_divergence_agrees_to_first_order_up_to_f_second_derivative(divergence):
    """At the reference `f'` is 0 and its slope in x is `f''(1)`: 1, and 1/2 for Jensen-Shannon."""
    one, options = jnp.ones(1), {"f_divergence": divergence}
    options |= {"alpha_divergence_coef": 0.3} if divergence == "alpha" else {}
    value, gradients = value_and_gradients("sigmoid", -3 * one, -7 * one, -3 * one, -7 * one, **options)
    slope = 0.25 * (0.5 if divergence == "js" else 1.0)
    np.testing.assert_allclose([value, *np.ravel(gradients)], [math.log(2), -slope, slope], rtol=1e-5)


def test_alpha_meets_reverse_and_forward_kl():
    _, logps, _, _ = random_case(3)
    arrays = dict(zip(NAMES, logps, strict=True))

    def losses(divergence, a=None):
        return jit_loss(**arrays, beta=0.3, f_divergence=divergence, alpha_divergence_coef=a).losses

    np.testing.assert_allclose(losses("alpha", 1.0), losses("reverse_kl"), rtol=1e-6)
    np.testing.assert_allclose(losses("alpha", 1.0 + 1e-4), losses("reverse_kl"), rtol=1e-3)
    np.testing.assert_allclose(losses("alpha", 0.0), losses("forward_kl"), rtol=1e-5)


def test_swapping_chosen_and_rejected_negates_the_contrast():
    _, logps, _, _ = random_case(4)
    swapped = [logps[i] for i in (1, 0, 3, 2)]
    for loss_type in ("sigmoid", "robust", "discopop", "ipo_unnormalized"):
        one, other = (
            dpo_loss(**dict(zip(NAMES, x, strict=True)), beta=0.3, loss_type=loss_type) for x in (logps, swapped)
        )
        for metrics, others in ((one.metrics, other.metrics), (other.metrics, one.metrics)):
            np.testing.assert_array_equal(metrics["reward_margin"], -others["reward_margin"])
            np.testing.assert_array_equal(metrics["rewards_chosen"], others["rewards_rejected"])
    # and cDPO with half of the labels flipped cannot tell the two apart
    half = [
        dpo_loss(**dict(zip(NAMES, x, strict=True)), beta=0.3, label_smoothing=0.5).losses for x in (logps, swapped)
    ]
    np.testing.assert_allclose(*half, rtol=1e-6)


def test_a_mean_instead_of_a_sum_divides_beta_by_the_length():
    _, logps, lengths, _ = random_case(2)
    length, arrays = 4.0, dict(zip(NAMES, logps, strict=True))
    means = {name: x / length for name, x in arrays.items()}
    np.testing.assert_allclose(dpo_loss(**means, beta=0.4).losses, dpo_loss(**arrays, beta=0.1).losses, rtol=1e-5)
    same = jnp.full(lengths.shape[1], length)
    normalised = dpo_loss(**arrays, beta=0.4, loss_type="sigmoid_norm", chosen_lengths=same, rejected_lengths=same)
    np.testing.assert_allclose(normalised.losses, dpo_loss(**arrays, beta=0.1).losses, rtol=1e-5)
    ipo = dpo_loss(**arrays, beta=0.4, loss_type="ipo", chosen_lengths=same, rejected_lengths=same).losses
    plain = dpo_loss(**arrays, beta=0.1, loss_type="ipo_unnormalized").losses
    np.testing.assert_allclose(ipo, plain / length**2, rtol=1e-5)


def test_robust_is_unbiased_under_the_label_noise_it_assumes():
    _, logps, _, _ = random_case(6)
    e, swapped = 0.2, [logps[i] for i in (1, 0, 3, 2)]
    kept, flipped = (
        dpo_loss(**dict(zip(NAMES, x, strict=True)), beta=0.3, loss_type="robust", label_smoothing=e).losses
        for x in (logps, swapped)
    )
    clean = dpo_loss(**dict(zip(NAMES, logps, strict=True)), beta=0.3).losses
    np.testing.assert_allclose((1 - e) * kept + e * flipped, clean, rtol=1e-5, atol=1e-6)


def test_exo_is_least_where_the_policy_believes_the_smoothed_label():
    e, beta = 0.2, 0.5
    best = jnp.full(1, math.log((1 - e) / e) / beta)
    zero = jnp.zeros(1)
    value, gradients = value_and_gradients("exo_pair", best, zero, zero, zero, label_smoothing=e)
    np.testing.assert_allclose([value, *np.ravel(gradients)], 0.0, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_transport_ignores_rows_of_weight_0_and_the_order_of_the_others(loss_type):
    _, logps, _, _ = random_case(8)
    weights = jnp.ones(1) if len(logps[0]) == 1 else jnp.array([1.0, 1, 0, 1, 1])
    logps = [np.resize(x, len(weights)) for x in logps]
    order = np.array([3, 2, 0, 4, 1])[: len(weights)]

    def run(rows, weights):
        arrays = dict(zip(NAMES, rows, strict=True))
        return np.asarray(dpo_loss(**arrays, beta=0.3, loss_type=loss_type, weights=weights).losses)

    full = run(logps, weights)
    real = np.asarray(weights) > 0
    np.testing.assert_allclose(full[real], run([x[real] for x in logps], None), rtol=1e-6)
    dirty = [np.where(real, x, np.nan) for x in logps]
    np.testing.assert_array_equal(run(dirty, weights), full)
    np.testing.assert_allclose(run([x[order] for x in logps], weights[order]), full[order], rtol=1e-6)


def test_transport_pairs_quantiles_not_rows():
    """Row-wise both contrasts are wrong; sorted, the chosen dominates the rejected."""
    zero = jnp.zeros(2)
    arrays = dict(zip(NAMES, [jnp.array([0.0, 4.0]), jnp.array([3.0, -1.0]), zero, zero], strict=True))
    losses = dpo_loss(**arrays, beta=1.0, loss_type="aot_unpaired").losses
    np.testing.assert_allclose(losses, [-log_sigmoid(1.0), -log_sigmoid(1.0)], rtol=1e-6)


@pytest.mark.parametrize("loss_type", [name for name in get_args(DPOLossType) if name not in ("ipo", "sigmoid_norm")])
@pytest.mark.parametrize("gap", [-1e4, -90.0, 90.0, 1e4])
def test_extreme_log_ratios_are_finite(loss_type, gap):
    zero, options = jnp.zeros(1), {"label_smoothing": 0.1} if loss_type == "exo_pair" else {}
    value, gradients = value_and_gradients(loss_type, jnp.array([gap]), -jnp.array([gap]), zero, zero, **options)
    assert np.all(np.isfinite([value, *np.ravel(gradients)]))


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_extreme_log_ratios_are_finite_under_every_divergence(divergence):
    options = {"f_divergence": divergence} | ({"alpha_divergence_coef": 3.0} if divergence == "alpha" else {})
    for gap in (-1e4, 1e4):
        gap, zero = jnp.array([gap]), jnp.zeros(1)
        value, gradients = value_and_gradients("sigmoid", gap, -gap, zero, zero, **options)
        assert np.all(np.isfinite([value, *np.ravel(gradients)]))


PER_TOKEN = jnp.ones(1)
NO_EFFECT = "given, but it would have no effect with loss_type"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "kto"}, "loss_type: got 'kto', expected one of sigmoid, sigmoid_norm"),
        ({"f_divergence": "tv"}, "f_divergence: got 'tv', expected one of reverse_kl, forward_kl, js, alpha"),
        ({"f_divergence": "alpha"}, "alpha_divergence_coef: got None, expected a number"),
        ({"alpha_divergence_coef": 0.5}, "alpha_divergence_coef: given, but it would have no effect"),
        ({"loss_type": "apo_zero", "f_divergence": "js"}, f"f_divergence: {NO_EFFECT} 'apo_zero'"),
        ({"loss_type": "aot", "f_divergence": "js"}, f"f_divergence: {NO_EFFECT} 'aot'"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, f"label_smoothing: {NO_EFFECT} 'hinge'"),
        ({"loss_type": "ipo"}, "chosen_lengths: got None, expected token counts .* because 'ipo'"),
        ({"loss_type": "sigmoid_norm", "chosen_lengths": PER_TOKEN}, "rejected_lengths: got None"),
        ({"rpo_alpha": 0.5}, "chosen_lengths: got None, expected token counts .* because rpo_alpha"),
        ({"chosen_lengths": PER_TOKEN}, f"chosen_lengths: {NO_EFFECT} 'sigmoid'"),
        (
            {"rpo_alpha": 1.0, "chosen_lengths": PER_TOKEN, "rejected_lengths": PER_TOKEN},
            f"rejected_lengths: {NO_EFFECT} 'sigmoid'",
        ),
        ({"bco_delta": 0.0}, f"bco_delta: {NO_EFFECT} 'sigmoid'"),
        ({"discopop_tau": 0.1}, f"discopop_tau: {NO_EFFECT} 'sigmoid'"),
        ({"weights": PER_TOKEN}, f"weights: {NO_EFFECT} 'sigmoid'"),
        ({"loss_type": "exo_pair"}, r"label_smoothing: got 0.0, expected in \(0, 1\)"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"label_smoothing: got 0.5, expected in \[0, 0.5\)"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(**dict.fromkeys(NAMES, jnp.zeros(1)), beta=0.1, **options)


def test_a_traced_smoothing_without_effect_is_refused_too():
    def loss(label_smoothing):
        arrays = dict.fromkeys(NAMES, jnp.zeros(1))
        return dpo_loss(**arrays, beta=0.1, loss_type="hinge", label_smoothing=label_smoothing).losses

    with pytest.raises(ValueError, match="label_smoothing: given"):
        jax.jit(loss)(0.0)
