"""One iteration's samples: prompts are drawn, completions sampled and rewarded, the curriculum told, tokens counted.

Dynamic sampling: groups whose rewards are all equal have no advantages and are replaced by groups of new prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from models.config import ModelConfig
from models.transformer import Params
from research.config.sections import Rollout
from research.data.examples import Records
from research.rollouts.curriculum import CurriculumSampler, PromptIterator
from research.rollouts.rewards import RolloutRewards
from research.rollouts.samples import Collected
from research.sampling.decoded import Decoded

Sampler = Callable[[Params, Mapping[str, np.ndarray], int], Decoded]
"""(policy, batch of prompts, number of the batch) -> completions; the number keys the random draws."""


class Spending(Protocol):
    """Counts what is spent: on a rollout, and on a forward pass of a frozen model."""

    def sampled(self, *, completions: int, tokens: int, prompt_tokens: int, context: float) -> None: ...
    def forward(self, *, model: ModelConfig, real_tokens: int, context: float) -> None: ...


@dataclass(frozen=True)
class RolloutCollector:
    """Collects an iteration's samples; `records` are those of the prompts, by prompt id."""

    sample: Sampler
    rewards: RolloutRewards
    records: Records
    how: Rollout

    def collect(self, policy: Params, prompts: PromptIterator, spent: Spending, step: int) -> Collected:
        """P groups of G samples, in iteration `step` from 1; what dynamic sampling discards is spent too.

        A `CurriculumSampler` of prompts is told which completions were right.
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
        prompt_lengths = rollouts.prompt_mask.sum(axis=1)
        context = float(prompt_lengths.mean() + (rollouts.lengths + rollouts.given_lengths).mean()) / 2
        spent.sampled(
            completions=len(rollouts.rewards),
            tokens=tokens,
            prompt_tokens=int(batch["prompt_mask"].sum()) + given,
            context=context,
        )
        for model in self.rewards.models:
            spent.forward(model=model, real_tokens=tokens + given + int(prompt_lengths.sum()), context=context)
        return found


def replace_equal_groups(draw: Callable[[int], Collected], *, prompts: int, rounds: int) -> Collected:
    """Groups of P prompts, those of different rewards first, from up to `rounds` further batches.

    Batches are drawn by number until P groups have different rewards; without further rounds the first stays as it is.
    Source: dynamic sampling, DAPO, Yu et al. 2025, Section 3.2.
    """
    drawn = [draw(0)]
    if rounds == 0:
        return drawn[0]
    useful = _useful(drawn[0])
    while useful.sum() < prompts and len(drawn) <= rounds:
        drawn.append(draw(len(drawn)))
        useful = np.concatenate([useful, _useful(drawn[-1])])
    kept = np.argsort(~useful, kind="stable")[:prompts]  # in the order drawn
    metrics = {key: float(np.mean([each.metrics[key] for each in drawn])) for key in drawn[0].metrics}
    metrics |= {
        "dynamic_sampling/rounds": float(len(drawn)),
        "dynamic_sampling/groups_drawn": float(len(useful)),
        "dynamic_sampling/groups_useful": float(useful.sum()),
        "dynamic_sampling/groups_unfilled": float(max(0, prompts - useful.sum())),
    }
    return _groups(drawn, kept)._replace(metrics=metrics)


def _useful(collected: Collected) -> np.ndarray:
    """Bool of each group, whether its rewards differ."""
    rollouts = collected.rollouts
    return np.ptp(rollouts.rewards.reshape(-1, rollouts.group_size), axis=1) != 0


def _groups(drawn: Sequence[Collected], kept: np.ndarray) -> Collected:
    """Some groups of several batches; episodes and errors are those of all."""
    first = drawn[0].rollouts
    rows = (kept[:, None] * first.group_size + np.arange(first.group_size)).reshape(-1)
    texts, prompts, turns, errors = (
        [value for each in drawn for value in getattr(each, name)] for name in ("texts", "prompts", "turns", "errors")
    )
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(each.rollouts, name) for each in drawn])[rows]
        for name, value in first._asdict().items()
        if isinstance(value, np.ndarray)
    }
    return drawn[0]._replace(
        rollouts=first._replace(**arrays),
        gold=np.concatenate([each.gold for each in drawn])[rows],
        texts=[texts[row] for row in rows],
        prompts=[prompts[row] for row in rows],
        turns=tuple(turns),
        errors=tuple(errors),
    )
