"""KTO from tokens to loss, the reference point of the global batch, and rows from rollouts."""

from typing import Any

import jax
import numpy as np
import pytest

from research.algorithms.kto import KTO, PROVIDES
from research.core.batch import UnpairedBatch
from research.train.step import eval_step, prepare_step
from tests.research.algorithms import hand
from tests.research.algorithms.toy import MODEL, frozen_models, host_batch, objective_scalars, rollouts, with_garbage

REWARDS = np.array([1, 0, 0, 1, 1, 1, 0, 0.0])
LENGTHS = np.array([8, 1, 3, 5, 2, 8, 4, 6])


def prepared(policy: Any, batch: UnpairedBatch, algorithm: KTO) -> UnpairedBatch:
    batch = batch.replace(ref_logps=None, reference_point=None)
    scalars = objective_scalars(algorithm)
    done = prepare_step(policy, batch, scalars, frozen_models(algorithm), algorithm=algorithm, config=MODEL)
    return jax.device_get(done)


@pytest.mark.parametrize("swapped", [False, True])
def test_equals_numpy_from_logits(policy: Any, reference: Any, swapped: bool) -> None:
    """Swapped, the policy is the reference's reference: the reference point changes sign, and one is 0."""
    algorithm = KTO()
    frozen = frozen_models(algorithm)
    if swapped:
        frozen = frozen.replace(reference=frozen.reference.replace(params=policy))
        policy, reference = reference, policy
    batch, scalars = host_batch(algorithm), objective_scalars(algorithm)
    spoiled = with_garbage(batch).replace(ref_logps=None, reference_point=None)
    batch = jax.device_get(prepare_step(policy, spoiled, scalars, frozen, algorithm=algorithm, config=MODEL))
    gaps = hand.sums(policy, batch.mismatched) - hand.sums(reference, batch.mismatched)
    z = max(0.0, hand.mean(gaps, batch.rows.weights))
    np.testing.assert_allclose(batch.reference_point, np.full(8, z), rtol=1e-5, atol=1e-6)
    x = hand.sums(policy, batch.rows) - hand.sums(reference, batch.rows)
    losses = np.where(batch.desirable, 1 - hand.sigmoid(0.3 * (x - z)), 1.5 * (1 - hand.sigmoid(0.3 * (z - x))))
    found = eval_step(policy, batch, scalars, algorithm=algorithm, config=MODEL)
    weights = batch.rows.weights
    assert float(found["loss"].mean()) == pytest.approx(hand.mean(losses, weights), rel=1e-5)
    for name, where in (("desirable", batch.desirable), ("undesirable", ~batch.desirable)):
        expected = hand.mean(0.3 * x, weights * where)
        assert float(found[f"rewards_{name}"].mean()) == pytest.approx(expected, rel=1e-5)


def test_one_of_the_two_reference_points_above_is_positive(policy: Any, reference: Any) -> None:
    batch = host_batch(KTO())
    gaps = hand.sums(policy, batch.mismatched) - hand.sums(reference, batch.mismatched)
    assert abs(hand.mean(gaps, batch.rows.weights)) > 0.1


def test_apo_zero_has_no_reference_point(policy: Any) -> None:
    algorithm = KTO("apo_zero_unpaired")
    batch = prepared(policy, host_batch(algorithm), algorithm)
    assert not batch.reference_point.any()
    x = hand.sums(policy, batch.rows) - batch.ref_logps
    losses = np.where(batch.desirable, 1 - hand.sigmoid(0.3 * x), 1.5 * (1 - hand.sigmoid(-0.3 * x)))
    found = eval_step(policy, batch, objective_scalars(algorithm), algorithm=algorithm, config=MODEL)
    assert float(found["loss"].mean()) == pytest.approx(hand.mean(losses, batch.rows.weights), rel=1e-5)


def test_rollouts_are_desirable_where_correct_and_mismatched_with_the_next_prompt_s_completion() -> None:
    drawn = rollouts(REWARDS, LENGTHS, group_size=4)._replace(rewards=-REWARDS)  # correctness decides, not reward
    batch, metrics = KTO().from_rollouts(drawn, seed=0)
    np.testing.assert_array_equal(batch.desirable, REWARDS == 1)
    assert metrics == {"desirable_fraction": 0.5}
    L = drawn.prompt_tokens.shape[1]
    for b in range(8):
        other = (b + 4) % 8
        for rows, completion in ((batch.rows, b), (batch.mismatched, other)):
            np.testing.assert_array_equal(rows.tokens[b, :L], drawn.prompt_tokens[b])
            np.testing.assert_array_equal(rows.tokens[b, L:], drawn.tokens[completion])
            np.testing.assert_array_equal(rows.loss_mask[b, L:], drawn.mask[completion])
            assert not rows.loss_mask[b, :L].any()
            real = np.concatenate([drawn.prompt_mask[b], drawn.mask[completion]])
            np.testing.assert_array_equal(rows.segment_ids[b], real)
            np.testing.assert_array_equal(rows.positions[b][real], np.arange(real.sum()))


def test_one_prompt_has_nothing_to_be_mismatched_with() -> None:
    drawn = rollouts(REWARDS[:4], LENGTHS[:4], group_size=4)
    with pytest.raises(ValueError, match="prompts_per_step: got 1, expected at least 2"):
        KTO().from_rollouts(drawn, seed=0)


def test_the_config_s_options_are_the_scalars_of_the_loss() -> None:
    traced = {key for key, option in next(iter(PROVIDES["objective"].values())).options.items() if option.traced}
    assert traced == objective_scalars(KTO()).keys()
