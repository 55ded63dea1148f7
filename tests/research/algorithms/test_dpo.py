"""DPO from tokens to loss, against NumPy that shares nothing with it but the logits."""

import dataclasses
from typing import Any, get_args

import jax
import numpy as np
import pytest

from objectives.dpo import DPOLossType
from research.algorithms import dpo
from research.algorithms.base import Setting
from research.algorithms.dpo import DPO
from research.core.batch import PreferenceBatch
from research.core.network import Network
from research.train.step import eval_step, prepare_step
from tests.research.algorithms import hand
from tests.research.algorithms.toy import (
    ALGORITHMS,
    MODEL,
    frozen_models,
    host_batch,
    host_params,
    no_effect,
    objective_scalars,
    with_garbage,
)

PLAIN = {"rpo_alpha": 0.0, "ld_alpha": 1.0, "label_smoothing": 0.0}


def prepared(algorithm: DPO, policy: Any, seed: int = 0) -> PreferenceBatch:
    batch = host_batch(algorithm, seed).replace(ref_chosen_logps=None, ref_rejected_logps=None)
    scalars = objective_scalars(algorithm)
    # Equal algorithms prepare alike: one compilation.
    done = prepare_step(policy, batch, scalars, frozen_models(algorithm), algorithm=DPO(), config=MODEL)
    return jax.device_get(done)


def evaluate(algorithm: DPO, policy: Any, batch: PreferenceBatch, **changes: float) -> dict[str, float]:
    scalars = objective_scalars(algorithm, **changes)
    found = eval_step(policy, batch, scalars, algorithm=algorithm, config=MODEL)
    return {name: float(value.mean()) for name, value in found.items()}


def test_sigmoid_equals_numpy_from_logits(policy: Any, reference: Any) -> None:
    batch = prepared(DPO(), policy)
    log_ratios = [hand.sums(policy, side) - hand.sums(reference, side) for side in (batch.chosen, batch.rejected)]
    contrast = log_ratios[0] - log_ratios[1]
    expected = hand.mean(-np.log(hand.sigmoid(0.5 * contrast)), batch.chosen.weights)
    found = evaluate(DPO(), policy, batch, **PLAIN)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["rewards_chosen"] == pytest.approx(hand.mean(0.5 * log_ratios[0], batch.chosen.weights), rel=1e-5)


def test_prepare_fills_in_token_log_probs_of_the_reference_not_of_the_policy(policy: Any, reference: Any) -> None:
    batch = prepared(DPO(), policy)
    for side, found in ((batch.chosen, batch.ref_chosen_logps), (batch.rejected, batch.ref_rejected_logps)):
        expected = hand.token_logps(reference, side)
        np.testing.assert_allclose(found[side.loss_mask], expected[side.loss_mask], atol=2e-5)
        assert np.abs(found - hand.token_logps(policy, side))[side.loss_mask].max() > 0.1


def test_at_its_own_reference_is_log_2(reference: Any) -> None:
    batch = prepared(DPO(), reference)
    found = evaluate(DPO(), reference, batch, **{**PLAIN, "label_smoothing": 0.1})
    assert found["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert found["reward_margin"] == pytest.approx(0, abs=1e-5)


def test_auxiliary_likelihood_and_length_desensitisation_equal_numpy(policy: Any, reference: Any) -> None:
    batch = prepared(DPO(), policy)
    losses, likelihood = [], []
    sides = (batch.chosen, batch.rejected)
    logps = [[hand.token_logps(p, side) for side in sides] for p in (policy, reference)]
    for b in range(8):
        shared = min(int(side.loss_mask[b].sum()) for side in sides)
        x = []
        for side in (0, 1):
            tokens = [(m[side])[b][sides[side].loss_mask[b]] for m in logps]
            ratio = tokens[0] - tokens[1]
            x.append(ratio[:shared].sum() + 0.25 * ratio[shared:].sum())
        losses.append(-np.log(hand.sigmoid(0.5 * (x[0] - x[1]))))
        likelihood.append(-logps[0][0][b][sides[0].loss_mask[b]].mean())
    weights = batch.chosen.weights
    found = evaluate(DPO(), policy, batch, **{**PLAIN, "ld_alpha": 0.25})
    assert found["loss"] == pytest.approx(hand.mean(np.array(losses), weights), rel=1e-5)
    plain = evaluate(DPO(), policy, batch, **PLAIN)
    found = evaluate(DPO(), policy, batch, **{**PLAIN, "rpo_alpha": 0.7})
    expected = plain["loss"] + 0.7 * hand.mean(np.array(likelihood), weights)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)


def test_wpo_weighs_a_pair_by_its_likelihood_under_the_policy(policy: Any, reference: Any) -> None:
    batch = prepared(DPO(), policy)
    weight, x = np.ones(8), []
    for side in (batch.chosen, batch.rejected):
        after = hand.log_probs(policy, side)
        x.append(hand.sums(policy, side) - hand.sums(reference, side))
        for b in range(8):
            slots = np.flatnonzero(side.loss_mask[b])
            own = [after[b, t - 1, side.tokens[b, t]] - np.log(np.exp(2 * after[b, t - 1]).sum()) for t in slots]
            weight[b] *= np.exp(np.mean(own))
    losses = -np.log(hand.sigmoid(0.5 * (x[0] - x[1]))) * weight
    found = evaluate(DPO(weighting="wpo"), policy, batch, **PLAIN)
    assert found["loss"] == pytest.approx(hand.mean(losses, batch.chosen.weights), rel=2e-5)


@pytest.mark.parametrize("loss_type", get_args(DPOLossType))
def test_every_loss_gets_just_the_options_it_reads(policy: Any, loss_type: Any) -> None:
    """Rows of weight 0 change nothing, in the losses that look at the whole batch too."""
    algorithm = DPO(loss_type)
    batch = host_batch(algorithm)
    scalars = objective_scalars(algorithm)
    totals = [
        jax.eval_shape(lambda b: algorithm.loss(Network(policy, MODEL), b, scalars, None), part)[0].total.shape
        for part in (batch, with_garbage(batch))
    ]
    assert totals == [(), ()]
    if algorithm.batch_coupled:
        found, spoiled = (evaluate(algorithm, policy, part) for part in (batch, with_garbage(batch)))
        assert found == pytest.approx(spoiled, rel=1e-6) and np.isfinite(list(found.values())).all()


def test_bco_s_shift_is_the_mean_reward_of_the_batch(policy: Any) -> None:
    algorithm = DPO("bco_pair")
    batch = host_batch(algorithm)
    weights = batch.chosen.weights
    x = [
        hand.sums(policy, side) - (ref * side.loss_mask).sum(axis=1)
        for side, ref in ((batch.chosen, batch.ref_chosen_logps), (batch.rejected, batch.ref_rejected_logps))
    ]
    delta = hand.mean(0.5 * (x[0] + x[1]) / 2, weights)
    losses = -np.log(hand.sigmoid(0.5 * x[0] - delta)) - np.log(hand.sigmoid(-(0.5 * x[1] - delta)))
    found = evaluate(algorithm, policy, batch, **PLAIN)
    assert found["loss"] == pytest.approx(hand.mean(losses, weights), rel=1e-5)


OBJECTIVE = dpo.PROVIDES["objective"]["dpo"]
OPTIONS = {
    "loss_type": "sigmoid", "f_divergence": "reverse_kl", "weighting": "none", "beta": 0.1,
    "label_smoothing": 0.0, "alpha_divergence_coef": 0.5, "discopop_tau": 0.05, "rpo_alpha": 0.0,
    "ld_alpha": 1.0, "pairs_per_prompt": 3,
}  # fmt: skip


def test_the_config_s_options_make_the_algorithm() -> None:
    assert OPTIONS.keys() == OBJECTIVE.options.keys()
    options = {**OPTIONS, "loss_type": "ipo", "weighting": "wpo"}
    made = OBJECTIVE.make(Setting(options=options, online=True, group_size=8, max_new_tokens=8))
    assert made == DPO("ipo", weighting="wpo") and made.pairs_per_prompt == 3
    assert OBJECTIVE.rows_per_group(OPTIONS, 8) == 3
    assert dataclasses.replace(made, pairs_per_prompt=1) == made  # read on the host: no compilation
    traced = {name for name, option in OBJECTIVE.options.items() if option.traced}
    assert traced == objective_scalars(ALGORITHMS["dpo"]).keys()


@pytest.mark.parametrize(
    ("changes", "online", "expected"),
    [
        ({}, True, {"alpha_divergence_coef", "discopop_tau"}),
        ({}, False, {"alpha_divergence_coef", "discopop_tau", "pairs_per_prompt"}),
        ({"f_divergence": "alpha"}, True, {"discopop_tau"}),
        ({"loss_type": "hinge"}, True, {"alpha_divergence_coef", "discopop_tau", "label_smoothing"}),
        ({"loss_type": "discopop"}, True, {"alpha_divergence_coef", "label_smoothing"}),
        ({"loss_type": "nca_pair"}, True, {"alpha_divergence_coef", "discopop_tau", "f_divergence", "label_smoothing"}),
    ],
)
def test_options_without_effect_are_named(changes: dict[str, Any], online: bool, expected: set[str]) -> None:
    assert no_effect(OBJECTIVE, {**OPTIONS, **changes}, online) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "exo_pair"}, "label_smoothing: got 0.0, expected above 0 because exo_pair takes its log"),
        ({"rpo_alpha": 1.0, "ld_alpha": 0.5}, "ld_alpha: got 0.5, expected 1 with rpo_alpha=1.0"),
        ({"loss_type": "apo_zero", "f_divergence": "js"}, "f_divergence: got 'js', expected 'reverse_kl'"),
    ],
)
def test_options_that_exclude_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    OBJECTIVE.check(OPTIONS)
    with pytest.raises(ValueError, match=message):
        OBJECTIVE.check({**OPTIONS, **changes})


def test_the_reference_of_the_tests_is_not_the_policy() -> None:
    assert not np.allclose(host_params()["embed"], host_params(seed=7)["embed"])
