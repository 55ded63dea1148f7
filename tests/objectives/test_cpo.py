"""CPO against explicit loops, its kinship with DPO and SimPO, and its refusals."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.cpo import cpo_loss
from objectives.dpo import dpo_loss
from objectives.simpo import simpo_loss
from tests.objectives.cases import SEEDS, random_logps

jit_loss = functools.partial(jax.jit, static_argnames="loss_type")(cpo_loss)


def random_case(seed):
    rng = np.random.default_rng(seed)
    batch = [5, 1][seed % 2]
    logps = random_logps(rng, 2, batch) * 5
    lengths = rng.integers(1, 9, (2, batch)).astype(np.float32)
    if seed % 5 == 0:
        logps[1], lengths[1] = logps[0], lengths[0]  # tie
    return rng, logps, lengths


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_golden(loss_type):
    for seed in SEEDS:
        rng, logps, lengths = random_case(seed)
        beta, coef = float(rng.uniform(0.1, 1)), float(rng.uniform(0.1, 2))
        e = 0.1 if loss_type == "sigmoid" else 0.0
        got = jit_loss(
            policy_chosen_logps=logps[0],
            policy_rejected_logps=logps[1],
            beta=beta,
            nll_coef=coef,
            chosen_lengths=lengths[0],
            loss_type=loss_type,
            **({"rejected_lengths": lengths[1]} if loss_type == "ipo" else {}),
            **({"label_smoothing": e} if loss_type == "sigmoid" else {}),
        )
        for b in range(logps.shape[1]):
            chosen, rejected = float(logps[0, b]), float(logps[1, b])
            if loss_type == "ipo":
                chosen, rejected = chosen / float(lengths[0, b]), rejected / float(lengths[1, b])
            d = chosen - rejected
            if loss_type == "sigmoid":
                contrast = (1 - e) * math.log1p(math.exp(-beta * d)) + e * math.log1p(math.exp(beta * d))
            else:
                contrast = max(0.0, 1 - beta * d) if loss_type == "hinge" else (d - 1 / (2 * beta)) ** 2
            nll = -float(logps[0, b]) / float(lengths[0, b])
            expected = {
                "losses": contrast + coef * nll,
                "nll_chosen": nll,
                "rewards_chosen": beta * chosen,
                "rewards_rejected": beta * rejected,
                "reward_margin": beta * d,
                "reward_accuracy": float(d > 0),
                "logps_chosen": float(logps[0, b]),
                "logps_rejected": float(logps[1, b]),
            }
            outputs = {"losses": got.losses, **got.metrics}
            assert set(outputs) == set(expected)
            for name, value in expected.items():
                np.testing.assert_allclose(
                    outputs[name][b], value, rtol=1e-5, atol=1e-5, err_msg=f"{name}, seed {seed}"
                )


def test_the_contrast_is_dpo_with_a_uniform_reference():
    _, logps, _ = random_case(2)
    pair = dict(zip(("policy_chosen_logps", "policy_rejected_logps"), logps, strict=True))
    uniform = jnp.full(logps.shape[1], -7.0)
    for loss_type in ("sigmoid", "hinge"):
        ours = cpo_loss(**pair, beta=0.3, nll_coef=0.0, loss_type=loss_type).losses
        dpo = dpo_loss(**pair, ref_chosen_logps=uniform, ref_rejected_logps=uniform, beta=0.3, loss_type=loss_type)
        np.testing.assert_allclose(ours, dpo.losses, rtol=1e-5, atol=1e-6)


def test_of_mean_log_probs_the_contrast_is_simpo_without_a_target():
    _, logps, lengths = random_case(4)
    means = dict(zip(("policy_chosen_logps", "policy_rejected_logps"), logps / lengths, strict=True))
    pair = dict(zip(means, logps, strict=True))
    rows = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    simpo = simpo_loss(**pair, **rows, beta=2.0, gamma=0.0).losses
    np.testing.assert_allclose(cpo_loss(**means, beta=2.0, nll_coef=0.0).losses, simpo, rtol=1e-5)


def loss_of_one(chosen, rejected, **options):
    return cpo_loss(policy_chosen_logps=chosen, policy_rejected_logps=rejected, **options)


def test_a_tie_costs_log_2_and_swapping_negates_the_margin():
    tie, options = jnp.full(1, -3.0), {"beta": 0.4, "nll_coef": 0.0}
    np.testing.assert_allclose(loss_of_one(tie, tie, **options).losses, math.log(2), rtol=1e-6)
    gradient = jax.grad(lambda c: loss_of_one(c, tie, **options).losses[0])(tie)
    np.testing.assert_allclose(gradient, [-0.2], rtol=1e-6)
    margins = [loss_of_one(a, b, **options).metrics["reward_margin"] for a, b in ((tie, tie - 1), (tie - 1, tie))]
    np.testing.assert_array_equal(margins[0], -margins[1])


ONE = jnp.ones(1)


def test_by_default_the_nll_of_the_chosen_counts_once():
    default = loss_of_one(-ONE, -ONE, beta=0.4, chosen_lengths=2 * ONE).losses
    np.testing.assert_allclose(default, 0.5 + math.log(2), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "simpo"}, "loss_type: got 'simpo', expected one of sigmoid, hinge, ipo"),
        ({}, "chosen_lengths: got None, expected token counts .* because nll_coef"),
        ({"loss_type": "ipo", "nll_coef": 0.0}, "chosen_lengths: got None, .* because 'ipo'"),
        ({"loss_type": "ipo", "chosen_lengths": ONE}, "rejected_lengths: got None"),
        ({"nll_coef": 0.0, "chosen_lengths": ONE}, "chosen_lengths: given, .* 'sigmoid' and nll_coef 0"),
        ({"chosen_lengths": ONE, "rejected_lengths": ONE}, "rejected_lengths: given, .* no effect"),
        (
            {"loss_type": "hinge", "nll_coef": 0.0, "label_smoothing": 0.1},
            "label_smoothing: given, .* loss_type 'hinge'",
        ),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        loss_of_one(ONE, ONE, beta=0.1, **options)
