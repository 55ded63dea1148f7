"""The loop over the policy's own samples: rejection sampling, pairs of own samples, PPO, GRPO, distillation."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from objectives.kl import kl_estimate
from objectives.reduce import sequence_sum, token_mean
from research.algorithms.base import rollout_batch
from research.analysis.rl_plots import write_reward_against_kl
from research.core.batch import Batch, RolloutBatch
from research.core.mesh import to_device
from research.core.metrics import METRICS, load_metrics
from research.core.network import Network, batch_logps
from research.data.pipelines import prompt_batches
from research.evals.problems import problem_metrics
from research.rollouts.curriculum import Curriculum, CurriculumSampler
from research.rollouts.rollout import Roller, rollout_metrics
from research.tasks.sources import View
from research.train.minibatches import mini_batches
from research.train.monitors import MonitorBounds, Monitors, reading_of
from research.train.offline import count_tokens
from research.train.session import Session, StageRun, due, iteration_seed

_PATIENCE = 8
"""Batches of prompts that filling one batch from the band of difficulty may pass over."""


def run_online(run: StageRun) -> dict[str, Any]:
    """Runs a stage to its end, from wherever it was; returns its result.

    One iteration: draw prompts, sample G completions of each, pay them, build a batch on the host, and pass over it
    `epochs` times in `minibatches` optimizer steps. A checkpoint falls between iterations, so no rollout is ever in
    flight.
    """
    stage = run.stage
    problems = View(run.sources.problems.train, stage.data.limit)
    keeper = Keeper(Roller(run, problems))
    with Session(run, _prompts(run, problems), keeper) as session:

        def measure(final: dict[str, float] | None = None) -> dict[str, float]:
            return problem_metrics(run, session.policy, final)

        if not session.curve:
            session.evaluate(0, measure)
        for step in range(session.done + 1, stage.steps + 1):
            metrics, tokens = _iterate(session, keeper, step)
            session.log(step, metrics, tokens=tokens)
            if due(step, stage.eval_every, stage.steps):
                session.evaluate(step, measure)
            session.save(step)
        final: dict[str, float] = {}
        session.evaluate(stage.steps, lambda: measure(final))
        if stage.start:  # without a start there is no KL to it
            rows = load_metrics(run.folder.path / METRICS)
            write_reward_against_kl({stage.name: rows}, run.folder.path / "reward_against_kl.png")
        return session.finish(final)


class Keeper:
    """What the loop keeps between iterations, besides the session: scores' statistics, alarms, the KL's reference."""

    def __init__(self, roller: Roller) -> None:
        """Nothing seen yet."""
        self.roller, self.monitors = roller, Monitors(MonitorBounds())
        self._reference: Network | None = None

    def get_state(self) -> dict[str, Any]:
        """Plain JSON, for the checkpoint."""
        return {"roller": self.roller.get_state(), "monitors": self.monitors.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """The inverse of `get_state`."""
        self.roller.set_state(state["roller"])
        self.monitors.set_state(state["monitors"])

    def reference(self, session: Session) -> Network:
        """What the KL is monitored against: the policy that the stage started from."""
        if not session.moved:
            return Network(session.policy, session.run.model)
        if self._reference is None:
            self._reference = session.frozen().reference or session.run.policy(session.run.stage.start)
        return self._reference


def _prompts(run: StageRun, problems: View) -> Any:
    """The endless iterator of prompts, filtered by difficulty where the stage says so."""
    stage, how = run.stage, run.stage.rollout
    pipeline = prompt_batches(
        problems if run.tools is None else run.tools.prompts(problems),
        run.sources.tokenizer,
        prompts_per_batch=how.prompts_per_step,
        max_prompt_length=how.max_prompt_length,
        seed=stage.seed,
        name=stage.name,
    )
    if not how.curriculum:
        return iter(pipeline)
    curriculum = Curriculum(
        len(problems),
        band=(how.curriculum_low, how.curriculum_high),
        decay=how.curriculum_decay,
        retry=how.curriculum_retry,
    )
    return CurriculumSampler(
        iter(pipeline),
        curriculum,
        batch_size=how.prompts_per_step,
        max_skipped=_PATIENCE * how.prompts_per_step,
        seed=stage.seed,
    )


def _iterate(session: Session, keeper: Keeper, step: int) -> tuple[dict[str, Any], int]:
    run, stage = session.run, session.run.stage
    drawn = keeper.roller.roll(session, step)
    rollouts = drawn.rollouts
    metrics: dict[str, Any] = rollout_metrics(drawn)
    if isinstance(session.data, CurriculumSampler):
        metrics.update(session.data.metrics())
    batch, chosen = session.algorithm.from_rollouts(rollouts, iteration_seed(stage.seed, step))
    metrics.update(chosen)
    tokens = int(rollouts.lengths.sum())
    shown = step % stage.log_every == 0 or step in (1, stage.steps)
    prepared: Batch | None = None
    counts = count_tokens(batch)
    if counts["target_tokens"]:
        prepared = session.prepare(batch, counts)
    if isinstance(prepared, RolloutBatch) and prepared.ref_logps is not None:
        kl = _kl(prepared.completion_mask, prepared.sampler_logps, prepared.ref_logps)
        metrics.update({name: float(value) for name, value in jax.device_get(kl).items()})
    elif shown and stage.rollout.monitor_kl and stage.start:
        drawn_batch = to_device(run.mesh, rollout_batch(rollouts, mask_truncated=False))
        kl = _reference_kl(keeper.reference(session), drawn_batch, stage.rollout.temperature)
        metrics.update({name: float(value) for name, value in jax.device_get(kl).items()})
    if prepared is not None:
        learned, trained = _learn(session, batch, prepared, step)
        metrics.update(learned)
        tokens += trained
        session.adapt(metrics, len(rollouts.rewards))
    metrics.update(keeper.monitors.update(reading_of(jax.device_get(metrics))))
    if shown:
        session.writer.write_samples(step, keeper.roller.samples(drawn))
    return metrics, tokens


def _learn(session: Session, host: Batch, prepared: Batch, step: int) -> tuple[dict[str, Any], int]:
    """All updates on one iteration's batch: their metrics, and the tokens that they read.

    A mini-batch without a target is passed over.
    """
    run, how = session.run, session.run.stage.rollout
    updates: list[dict[str, Any]] = []
    tokens = last_pass = 0
    for epoch in range(how.epochs):
        last_pass = len(updates)
        seed = (run.stage.seed, step, epoch)
        for counted, part in mini_batches(host, prepared, run.mesh, parts=how.minibatches, seed=seed):
            counts = count_tokens(counted)
            if counts["target_tokens"]:
                updates.append(session.update(part, counts))
                tokens += counts["real_tokens"]
    return _summary(updates, last_pass), tokens


@partial(jax.jit, static_argnames="last_pass")
def _summary(updates: list[dict[str, Array]], last_pass: int) -> dict[str, Array]:
    """Means over the updates of the last pass, which begins at `last_pass`.

    But `sampler_trainer_gap` is the first update's, before the policy has moved, and `skipped_updates` counts all.
    """
    metrics: dict[str, Array] = jax.tree.map(lambda *found: sum(found) / len(found), *updates[last_pass:])
    metrics["skipped_updates"] = sum((each["skipped_updates"] for each in updates), jnp.float32(0.0))
    if "sampler_trainer_gap" in metrics:
        metrics["sampler_trainer_gap"] = updates[0]["sampler_trainer_gap"]
    return metrics


@jax.jit
def _kl(mask: Array, sampler_logps: Array, ref_logps: Array) -> dict[str, Array]:
    """KL of the policy that sampled to the reference: nats per completion (k1) and per token (k3)."""
    logps, ref_logps = (jnp.where(mask, x, 0.0) for x in (sampler_logps, ref_logps))
    return {
        "kl/reference": sequence_sum(kl_estimate(logps, ref_logps, "k1"), mask).mean(),
        "kl_ref": token_mean(kl_estimate(logps, ref_logps, "k3"), mask).mean(),
    }


@jax.jit
def _reference_kl(reference: Network, batch: RolloutBatch, temperature: float) -> dict[str, Array]:
    ref = batch_logps(reference.params, reference.config, batch.sequences, temperature)
    return _kl(batch.completion_mask, batch.sampler_logps, ref.logps)
