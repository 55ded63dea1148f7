"""Rejection sampling: keep the shortest correct samples, fine-tune on them, repeat (STaR, RFT, ReST)."""

import dataclasses
from typing import Literal

import numpy as np

from research.algorithms.base import Objective, Rollouts, provides
from research.algorithms.sft import NEXT_TOKEN_OPTIONS, NextToken
from research.config.schema import choice, static_number
from research.core.batch import SequenceBatch

Selector = Literal["leanest", "random"]


@dataclasses.dataclass(frozen=True)
class RejectionSampling(NextToken):
    """Selection on the host, then the next-token loss.

    Sources: STaR (Zelikman et al. 2022), RFT (Yuan et al. 2023), ReST (Gulcehre et al. 2023).
    """

    keep_per_prompt: int = dataclasses.field(default=2, compare=False)
    selector: Selector = dataclasses.field(default="leanest", compare=False)

    def from_rollouts(self, rollouts: Rollouts, seed: int) -> tuple[SequenceBatch, dict[str, float]]:
        """`[P * keep_per_prompt]` rows; unfilled ones have weight 0."""
        rng = np.random.default_rng(seed)
        G, keep = rollouts.group_size, self.keep_per_prompt
        rows, weights = [], []
        for start in range(0, len(rollouts.rewards), G):
            correct = start + np.flatnonzero((rollouts.correct & rollouts.stopped)[start : start + G])
            correct = rng.permutation(correct)
            if self.selector == "leanest":
                correct = correct[np.argsort(rollouts.lengths[correct], kind="stable")]
            chosen = correct[:keep]
            rows.append(np.concatenate([chosen, np.full(keep - len(chosen), start)]))
            weights.append(np.arange(keep) < len(chosen))
        weight = np.concatenate(weights)
        batch = rollouts.rows(np.concatenate(rows).astype(np.int64), weight)
        return batch, {"selected": float(weight.sum()), "selected_fraction": float(weight.mean())}


OPTIONS = {
    **NEXT_TOKEN_OPTIONS,
    "keep_per_prompt": static_number(4, "Correct samples kept of each prompt, at most.", 1),
    "selector": choice(
        "leanest", "Which of the correct are kept: those of the fewest tokens; random is the control.", "random"
    ),
}

PROVIDES = provides(
    Objective(
        "rejection_sampling",
        RejectionSampling.from_setting,
        OPTIONS,
        own=True,
        reads=lambda _options: frozenset({"correct"}),
        rows_per_group=lambda options, _group_size: int(options["keep_per_prompt"]),
    )
)
