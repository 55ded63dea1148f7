"""What every online run logs about its samples."""

import numpy as np
import pytest

from research.algorithms.dpo import DPO
from research.algorithms.rejection_sampling import RejectionSampling
from research.loops.offline import count_tokens
from research.loops.online import rollout_metrics
from tests.research.algorithms.toy import grpo, rollouts

REWARDS = np.array([1, 0, 0, 0, 0, 0, 0, 0.0])
LENGTHS = np.array([8, 1, 3, 5, 2, 8, 4, 6])
STOPPED = np.array([True, True, True, True, True, False, True, True])


def test_rollout_metrics() -> None:
    drawn = rollouts(REWARDS, LENGTHS, group_size=4, stopped=STOPPED)
    metrics = rollout_metrics(drawn)
    assert metrics["reward/mean"] == pytest.approx(1 / 8)
    assert metrics["reward/best_of_group"] == pytest.approx(1 / 2)
    assert metrics["completions/mean_length"] == pytest.approx(LENGTHS.mean())
    assert metrics["completions/mean_length_right"] == 8
    assert metrics["completions/mean_length_wrong"] == pytest.approx(29 / 7)
    assert metrics["completions/truncated_fraction"] == pytest.approx(1 / 8)
    assert metrics["sampler_entropy_estimate"] == pytest.approx(-drawn.sampler_logps.sum() / 37, rel=1e-5)


def test_without_a_right_answer_there_is_no_length_of_right_ones() -> None:
    metrics = rollout_metrics(rollouts(np.zeros(8), LENGTHS, group_size=4))
    assert "completions/mean_length_right" not in metrics and np.isfinite(list(metrics.values())).all()


def test_an_update_is_charged_for_what_it_learns_from() -> None:
    drawn = rollouts(REWARDS, LENGTHS, group_size=4, stopped=STOPPED)
    every, _ = grpo().from_rollouts(drawn, 0)
    assert count_tokens(every)["target_tokens"] == LENGTHS.sum()
    assert count_tokens(every)["real_tokens"] == LENGTHS.sum() + drawn.prompt_mask.sum()
    kept, _ = RejectionSampling("rollouts").from_rollouts(drawn, 0)
    assert count_tokens(kept)["target_tokens"] == 8
    pairs, _ = DPO("rollouts", pairs_per_prompt=1).from_rollouts(drawn, 0)
    assert count_tokens(pairs)["target_tokens"] in (8 + 1, 8 + 3, 8 + 5)
