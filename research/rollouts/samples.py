"""Rewarded samples of one iteration: what is logged of them, what a person reads."""

from typing import Any, NamedTuple

import numpy as np

from research.algorithms.base import Rollouts
from research.environments.turns import RowTurns, turn_metrics
from research.rewards.base import RewardError

_SHOWN = 4
"""Prompts whose first completion is shown."""


class Collected(NamedTuple):
    """B samples with their rewards."""

    rollouts: Rollouts  # what is learned from
    # `[B]` float32, what the yardstick says of each: 1 or more is right; 0 where it cannot tell, and for a completion
    # that never stopped. Logged, never learned from
    gold: np.ndarray
    texts: list[str]  # B decoded completions, whole and with their markup where tools may be called, and their prompts
    prompts: list[str]
    metrics: dict[str, float]  # means of these samples
    # where each sampled row stood at its end, those of discarded groups included; empty without tools
    turns: tuple[RowTurns, ...] = ()
    errors: tuple[RewardError, ...] = ()  # what reward functions raised


def rollout_metrics(collected: Collected) -> dict[str, float]:
    """What every online run logs of its samples, whatever it learns from them.

    Lengths and entropy are of the tokens that the policy drew; `tools/forced_tokens` counts those it was given.
    """
    rollouts = collected.rollouts
    lengths, right = rollouts.lengths, collected.gold >= 1.0
    groups = rollouts.rewards.reshape(-1, rollouts.group_size)
    metrics = {
        **collected.metrics,
        **(turn_metrics(collected.turns) if collected.turns else {}),
        "reward/mean": float(rollouts.rewards.mean()),
        "reward/std": float(rollouts.rewards.std()),
        "reward/best_of_group": float(groups.max(axis=1).mean()),
        "reward/gold": float(collected.gold.mean()),
        "frac_reward_zero_std": float((np.ptp(groups, axis=1) == 0).mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/truncated_fraction": float(1.0 - rollouts.stopped.mean()),
        "sampler_entropy_estimate": float(-rollouts.sampler_logps.sum() / max(lengths.sum(), 1)),
    }
    for name, rows in (("right", right), ("wrong", ~right)):
        if rows.any():
            metrics[f"completions/mean_length_{name}"] = float(lengths[rows].mean())
    return metrics


def shown_samples(collected: Collected) -> list[dict[str, Any]]:
    """The first completion of the first prompts, for a person to read."""
    rollouts = collected.rollouts
    return [
        {
            "prompt": collected.prompts[first],
            "completion": collected.texts[first],
            "reward": float(rollouts.rewards[first]),
            "gold": float(collected.gold[first]),
            "stopped": bool(rollouts.stopped[first]),
            "sampler_logps": float(rollouts.sampler_logps[first].sum()),
        }
        for first in range(0, len(collected.texts), rollouts.group_size)[:_SHOWN]
    ]
