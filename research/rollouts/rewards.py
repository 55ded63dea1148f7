"""Rewards of samples, by functions or models, shaped, and by step; and, apart from them, which samples are right."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from models.config import ModelConfig
from research.algorithms.base import Rollouts
from research.config.sections import Reward
from research.data.records import Record
from research.rewards.base import Dialogue, RewardContext, RewardFunction, Sample, WeightedReward, score
from research.rewards.learned import ProcessScorer, RewardScorer
from research.rewards.shaping import RunningNorm, shape
from research.rollouts.samples import Collected
from research.sampling.decoded import Decoded, decoded_rows
from research.tasks.base import Task


@dataclass
class RolloutRewards:
    """Rewards samples as a stage says; keeps the running statistics of its scores."""

    section: Reward  # the stage's `reward` section
    functions: Sequence[WeightedReward]  # reward functions; unused where reward models score
    yardstick: RewardFunction  # `evaluation.correct`, or the task's own: logged (`gold`), never learned from
    task: Task
    group_size: int
    max_new_tokens: int
    seed: int
    # reward models; None where functions score. The verifier's score is then logged but not used for training
    scorer: RewardScorer | None = None
    process: ProcessScorer | None = None  # process reward model that scores steps; None without rewards of steps
    norm: RunningNorm = RunningNorm()  # statistics of the scores so far

    @property
    def models(self) -> tuple[ModelConfig, ...]:
        """The frozen models that read every sample."""
        networks = [*(self.scorer.networks if self.scorer else ()), *([self.process.network] if self.process else ())]
        return tuple(network.config for network in networks)

    def __call__(
        self, prompts: Mapping[str, np.ndarray], records: Sequence[Record], out: Decoded, step: int
    ) -> Collected:
        """Rewards the completions of P prompts.

        `Rollouts.correct` selects samples and steers the curriculum: the functions' weighted sum reaches
        `success_threshold`, every function could tell, and the completion stopped; with reward models, the score is
        above its group's mean. Shaping and normalisation do not enter it.

        Args:
          prompts: {prompt_tokens, prompt_mask `[P, L]`, prompt_id `[P]`}.
          records: of the P prompts, every column.
          out: B = P * G completions.
          step: unique to this batch; enters the seeds of reward functions.
        """
        G = self.group_size
        asked = [self.task.prompt(record) for record in records]
        samples = self._samples(prompts["prompt_id"], records, asked, out, step)
        paid = None if self.scorer else score(samples, self.functions, unknown=self.section.unknown)
        # The yardstick runs once where it is a reward too.
        own = [name for name, function, _ in self.functions if function == self.yardstick] if paid else []
        judged = paid if paid and own else score(samples, [WeightedReward("correct", self.yardstick)])
        verdicts = judged.values[own[0] if own else "correct"]
        errors = judged.errors if own or not paid else (*paid.errors, *judged.errors)
        gold = np.where(out.stopped, np.nan_to_num(verdicts), 0.0).astype(np.float32)
        if paid is None:
            assert self.scorer is not None
            scores = self.scorer(decoded_rows(prompts, out, G))
            groups = scores.reshape(-1, G) - scores[::G, None]  # equal scores give exactly 0
            correct = (groups > groups.mean(axis=1, keepdims=True)).reshape(-1)
        else:
            scores, correct = paid.rewards, (paid.rewards >= self.section.success_threshold) & paid.known & out.stopped
        shaped = shape(
            scores,
            correct=correct,
            texts=out.texts,
            lengths=out.lengths,
            stopped=out.stopped,
            group_size=G,
            max_new_tokens=self.max_new_tokens,
            spec=self.section,
            state=self.norm,
        )
        self.norm = shaped.state
        metrics = {**shaped.metrics(), **(paid.metrics() if paid else {}), **out.metrics}
        metrics["reward/gold_unknown"] = float(np.isnan(verdicts).mean())
        steps: dict[str, np.ndarray] = {}
        if self.process is not None:
            L = prompts["prompt_tokens"].shape[1]
            probs, ends = (found[:, L:] for found in self.process.steps(decoded_rows(prompts, out, G)))
            steps = {"step_rewards": np.float32(self.section.step_coef) * probs, "step_mask": ends}
            metrics["reward/steps"] = float(steps["step_rewards"].sum(axis=1).mean())
        rollouts = Rollouts(
            prompt_tokens=np.repeat(prompts["prompt_tokens"], G, axis=0),
            prompt_mask=np.repeat(prompts["prompt_mask"], G, axis=0),
            tokens=out.arrays.tokens,
            mask=out.arrays.mask,
            sampler_logps=out.arrays.sampler_logps,
            stopped=out.stopped,
            rewards=shaped.rewards,
            correct=correct,
            prompt_ids=np.repeat(prompts["prompt_id"], G),
            group_size=G,
            advantage_scale=shaped.advantage_scale,
            given=out.given,
            **steps,
        )
        shown = ["\n".join(message.content for message in messages) for messages in asked for _ in range(G)]
        return Collected(rollouts, gold, out.shown, shown, metrics, out.turns, errors)

    def _samples(
        self, prompt_ids: np.ndarray, records: Sequence[Record], asked: Sequence[Any], out: Decoded, step: int
    ) -> list[Sample]:
        """What reward functions are called with: a completion's text is what follows its last tool result."""
        found = []
        for row, (text, length, stopped) in enumerate(zip(out.texts, out.lengths, out.stopped, strict=True)):
            prompt, number = divmod(row, self.group_size)
            prompt_id = int(prompt_ids[prompt])
            seed = int(np.random.SeedSequence((self.seed, step, prompt_id, number)).generate_state(1)[0])
            turns = Dialogue(out.shown[row], out.turns[row].calls, out.turns[row].reward) if out.turns else None
            context = RewardContext(self.task, asked[prompt], int(length), bool(stopped), seed, turns)
            found.append(Sample(text, records[prompt], context, prompt_id))
        return found

    def get_state(self) -> dict[str, Any]:
        """Plain JSON, for the checkpoint."""
        return asdict(self.norm)

    def set_state(self, state: dict[str, Any]) -> None:
        """The inverse of `get_state`."""
        self.norm = RunningNorm(**state)
