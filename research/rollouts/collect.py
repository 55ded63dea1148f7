"""One iteration's samples: prompts are drawn, completions sampled and rewarded, the curriculum told, tokens counted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from models.config import ModelConfig
from models.transformer import Params
from research.config.sections import Rollout
from research.data.examples import Records
from research.rollouts.curriculum import CurriculumSampler, PromptIterator
from research.rollouts.dynamic import replace_equal_groups
from research.rollouts.rewards import RolloutRewards
from research.rollouts.samples import Collected
from research.sampling.decoded import Decoded

Sampler = Callable[[Params, Mapping[str, np.ndarray], int], Decoded]
"""(policy, batch of prompts, number of the batch) -> completions; the number keys the random draws."""


class Spending(Protocol):
    """Counts what is spent."""

    def sampled(self, *, completions: int, tokens: int, prompt_tokens: int, context: float) -> None:
        """A rollout."""

    def forward(self, *, model: ModelConfig, real_tokens: int, context: float) -> None:
        """A forward pass of a frozen model."""


@dataclass(frozen=True)
class RolloutCollector:
    """Collects an iteration's samples.

    Attributes:
      sample: draws completions.
      rewards: rewards them.
      records: of the prompts, by prompt id.
      how: the stage's `rollout` section.
    """

    sample: Sampler
    rewards: RolloutRewards
    records: Records
    how: Rollout

    def collect(self, policy: Params, prompts: PromptIterator, spent: Spending, step: int) -> Collected:
        """P groups of G samples; what dynamic sampling discards is spent too.

        Args:
          policy: its parameters.
          prompts: batches of prompts; a `CurriculumSampler` is told which completions were right.
          spent: counters.
          step: the iteration, from 1.
        """
        rounds = self.how.resample_rounds
        found = replace_equal_groups(
            lambda number: self._draw(policy, prompts, spent, step * (rounds + 1) + number),
            prompts=self.how.prompts_per_step,
            rounds=rounds,
        )
        if isinstance(prompts, CurriculumSampler):
            return found._replace(metrics=found.metrics | prompts.metrics())
        return found

    def _draw(self, policy: Params, prompts: PromptIterator, spent: Spending, number: int) -> Collected:
        batch = next(prompts)
        records = [self.records[int(index)] for index in batch["prompt_id"]]
        found = self.rewards(batch, records, self.sample(policy, batch, number), number)
        rollouts = found.rollouts
        if isinstance(prompts, CurriculumSampler):  # not by the rewards, which are shaped
            prompts.curriculum.update(rollouts.prompt_ids, rollouts.correct)
        # Tool results are read, as prompts are: they cost a forward pass, and nobody samples them.
        tokens, given = int(rollouts.lengths.sum()), int(rollouts.given_lengths.sum())
        completions = rollouts.lengths + rollouts.given_lengths
        context = float(rollouts.prompt_mask.sum(axis=1).mean() + completions.mean()) / 2
        spent.sampled(
            completions=len(rollouts.rewards),
            tokens=tokens,
            prompt_tokens=int(batch["prompt_mask"].sum()) + given,
            context=context,
        )
        for model in self.rewards.models:
            real_tokens = tokens + given + int(rollouts.prompt_mask.sum())
            spent.forward(model=model, real_tokens=real_tokens, context=context)
        return found
