"""What every online run logs about its samples, and what an update on them costs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from research.algorithms.dpo import DPO
from research.algorithms.ppo import PPO
from research.algorithms.rejection_sampling import RejectionSampling
from research.config.optimizers import ADAMW
from research.core.checkpoint import restore_subtree
from research.core.state import abstract_state
from research.rollouts.samples import Collected, rollout_metrics
from research.train.batches import count_tokens
from research.train.chain import Finished
from tests.research.algorithms.toy import grpo, rollouts
from tests.research.train.chain import Shared

REWARDS = np.array([1, 0, 0, 0, 0, 0, 0, 0.0])
LENGTHS = np.array([8, 1, 3, 5, 2, 8, 4, 6])
STOPPED = np.array([True, True, True, True, True, False, True, True])


def lines(run: Finished, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder.path / name).read_text("utf-8").splitlines()]


def drawn(rewards: np.ndarray = REWARDS, stopped: np.ndarray = STOPPED) -> Collected:
    """The reward is half of the yardstick's value, which alone says what is right."""
    made = rollouts(rewards / 2, LENGTHS, group_size=4, stopped=stopped)
    return Collected(made, rewards, [""] * 8, [""] * 8, {"reward/score": 0.5})


def test_rollout_metrics() -> None:
    batch = drawn()
    metrics = rollout_metrics(batch)
    assert metrics["reward/mean"] == pytest.approx(1 / 16)
    assert metrics["reward/std"] == pytest.approx(np.sqrt(1 / 8 - 1 / 64) / 2)
    assert metrics["reward/best_of_group"] == pytest.approx(1 / 4)
    assert metrics["reward/gold"] == pytest.approx(1 / 8)
    assert metrics["frac_reward_zero_std"] == pytest.approx(1 / 2)
    assert metrics["completions/mean_length"] == pytest.approx(LENGTHS.mean())
    assert metrics["completions/mean_length_right"] == 8
    assert metrics["completions/mean_length_wrong"] == pytest.approx(29 / 7)
    assert metrics["completions/truncated_fraction"] == pytest.approx(1 / 8)
    assert metrics["sampler_entropy_estimate"] == pytest.approx(-batch.rollouts.sampler_logps.sum() / 37, rel=1e-5)
    assert metrics["reward/score"] == 0.5


def test_without_a_right_answer_there_is_no_length_of_right_ones() -> None:
    metrics = rollout_metrics(drawn(np.zeros(8)))
    assert "completions/mean_length_right" not in metrics and np.isfinite(list(metrics.values())).all()
    assert metrics["frac_reward_zero_std"] == 1


@pytest.mark.slow
def test_refilled_slots_draw_the_same_rollouts(shared: Shared, tmp_path: Path, quick: None) -> None:
    """A run that decodes six completions at a time writes the samples of one that decodes all at once."""
    del quick
    whole = shared.run({"rl.steps": 1}, shared.copy(tmp_path / "whole"))
    few = shared.run(
        {"rl.steps": 1, "sampler.slots": 6, "sampler.admit": 2, "sampler.chunk": 3}, shared.copy(tmp_path / "few")
    )
    assert few.folder.hash == whole.folder.hash
    one, two = (lines(run, "samples.jsonl") for run in (whole, few))
    assert [(each["prompt"], each["completion"]) for each in one] == [
        (each["prompt"], each["completion"]) for each in two
    ]
    np.testing.assert_allclose(
        [each["sampler_logps"] for each in one], [each["sampler_logps"] for each in two], atol=1e-4
    )
    name = "sampler/slot_utilization"
    shares = [line[name] for line in lines(few, "metrics.jsonl") if name in line]
    assert len(shares) == 1 and 0.3 < shares[0] <= 1
    assert not any(name in line for line in lines(whole, "metrics.jsonl"))


def test_an_update_is_charged_for_what_it_learns_from() -> None:
    made = rollouts(REWARDS, LENGTHS, group_size=4, stopped=STOPPED)
    every, _ = grpo().from_rollouts(made, 0)
    assert count_tokens(every)["target_tokens"] == LENGTHS.sum()
    assert count_tokens(every)["real_tokens"] == LENGTHS.sum() + made.prompt_mask.sum()
    stopped, _ = grpo(mask_truncated=True).from_rollouts(made, 0)
    assert count_tokens(stopped)["target_tokens"] == LENGTHS[STOPPED].sum()
    kept, _ = RejectionSampling().from_rollouts(made, 0)
    assert count_tokens(kept)["target_tokens"] == 8
    pairs, _ = DPO(pairs_per_prompt=1).from_rollouts(made, 0)
    assert count_tokens(pairs)["target_tokens"] in (8 + 1, 8 + 3, 8 + 5)


def test_an_iteration_of_truncated_completions_moves_no_controller(shared: Shared, tmp_path: Path, quick: None) -> None:
    """Nothing is learned from one token of each answer, in the logged iterations 1 and 3 nor in the other."""
    del quick
    changes = {
        "rl.log_every": 10,
        "rl.objective.name": "ppo",
        "rl.objective.ppo.kl_controller": "adaptive",
        "rl.objective.ppo.target_kl": 1e-3,
        "rl.objective.ppo.horizon": 10.0,
        "rl.objective.ppo.mask_truncated": True,
        "rl.rollout.max_new_tokens": 1,
    }
    done = shared.run(changes, shared.copy(tmp_path))
    logged = [line for line in lines(done, "metrics.jsonl") if "kl/reference" in line]
    assert [line["step"] for line in logged] == [1, 3]
    assert {line["completions/truncated_fraction"] for line in logged} == {1.0}
    layout = abstract_state(shared.setup.models["model"], shared.setup.mesh, ADAMW, "actor_critic")
    record = restore_subtree(done.folder.checkpoints, layout.params).record
    assert record["objective_scalars"]["kl_coef"] == pytest.approx(0.05)


@pytest.mark.parametrize("metrics", [{}, {"kl/reference": float("nan")}])
def test_the_kl_controller_stays_where_no_kl_was_measured(metrics: dict[str, float]) -> None:
    algorithm = PPO(max_new_tokens=8, adaptive=True, target_kl=1.0, horizon=10.0)
    scalars = {"kl_coef": np.float32(0.05)}
    assert algorithm.adapt(scalars, metrics, 8) == scalars
    assert algorithm.adapt(scalars, {"kl/reference": 2.0}, 8)["kl_coef"] == pytest.approx(0.05 * 1.16)
