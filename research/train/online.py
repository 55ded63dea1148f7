"""The loop over the policy's own samples: rejection sampling, pairs of own samples, PPO, GRPO, distillation."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from models.transformer import Params
from objectives.kl import kl_estimate
from objectives.reduce import sequence_sum, token_mean
from research.algorithms.base import rollout_batch
from research.analysis.plots import write_reward_against_kl
from research.core.batch import Batch, RolloutBatch
from research.core.errors import DataError
from research.core.mesh import to_device
from research.core.metrics import METRICS, load_metrics
from research.core.network import Network, batch_logps
from research.data.pipelines import prompt_batches
from research.data.records import Selected, first_records
from research.data.report import DataReport
from research.rewards.base import RewardError, WeightedReward
from research.rollouts.collect import RolloutCollector, Sampler
from research.rollouts.curriculum import Curriculum, CurriculumSampler
from research.rollouts.rewards import RolloutRewards
from research.rollouts.samples import rollout_metrics, shown_samples
from research.sampling.decoded import Decoded, sample_prompts, sampler_spec
from research.sampling.methods import SamplingMethod
from research.sampling.types import make_scalars
from research.train.batches import count_tokens
from research.train.learner import Learner
from research.train.measure import held_out_metrics, process_scorer, reward_scorer
from research.train.minibatches import mini_batches
from research.train.monitors import Monitors
from research.train.run import StageRun
from research.train.session import Session

_ERRORS = 20
"""Errors of reward functions that are kept in a stage's note."""
_PATIENCE = 8
"""Batches of prompts that filling one batch from the band of difficulty may pass over."""


def run_online(run: StageRun) -> dict[str, Any]:
    """Runs a stage to its end, from wherever it was; returns its result.

    One iteration: draw prompts, sample G completions of each, reward them, build a batch on the host, and pass over it
    `epochs` times in `minibatches` optimizer steps. A checkpoint falls between iterations, so no rollout is ever in
    flight.
    """
    stage = run.stage
    problems = first_records(run.sources.problems.train, stage.data.limit)
    state = OnlineState(RolloutCollector(_sampler(run, problems), _rewards(run), problems, stage.rollout))
    prompts, report = _prompts(run, problems)
    with Session(run, prompts, rewards=state.collector.rewards, monitors=state.monitors) as session:
        session.tell(report)
        for step in session.steps(partial(held_out_metrics, session), at_start=True):
            metrics, tokens = _iterate(session, state, step)
            session.log(step, metrics, tokens=tokens)
        if stage.start:  # without a start there is no KL to it
            rows = load_metrics(run.folder.path / METRICS)
            write_reward_against_kl({stage.name: [rows]}, run.folder.path / "reward_against_kl.png")
        return session.finish()


@dataclasses.dataclass
class OnlineState:
    """What the loop keeps between iterations, besides the session; `reference` is what the KL is monitored against."""

    collector: RolloutCollector
    monitors: Monitors = dataclasses.field(default_factory=Monitors)
    reference: Network | None = None


def _sampler(run: StageRun, problems: Selected) -> Sampler:
    """Draws completions as the stage says."""
    how, tokenizer = run.stage.rollout, run.sources.tokenizer
    spec = sampler_spec(
        tokenizer,
        run.experiment.sampler,
        samples=how.group_size,
        max_new_tokens=how.max_new_tokens,
        method=SamplingMethod(top_k=how.top_k, nucleus=how.top_p < 1.0),
        interactive=run.setup.interaction is not None,
    )

    def sample(policy: Params, prompts: Mapping[str, np.ndarray], number: int) -> Decoded:
        scalars = make_scalars(seed=run.stage.seed, step=number, temperature=how.temperature, top_p=how.top_p)
        return sample_prompts(
            policy, prompts, scalars, model=run.model, spec=spec, mesh=run.mesh, tokenizer=tokenizer,
            interaction=run.setup.interaction, records=problems,
        )  # fmt: skip

    return sample


def _rewards(run: StageRun) -> RolloutRewards:
    """What rewards samples, as the stage says; loads its reward models."""
    stage, section = run.stage, run.stage.reward
    functions = stage.chosen("reward", "functions")
    weights = section.weights or (1.0,) * len(functions)
    return RolloutRewards(
        section,
        [WeightedReward(f.component.name, f.make(), weight) for f, weight in zip(functions, weights, strict=True)],
        run.setup.yardstick,
        run.sources.task,
        group_size=stage.rollout.group_size,
        max_new_tokens=stage.rollout.max_new_tokens,
        seed=stage.seed,
        scorer=reward_scorer(run) if section.source == "model" else None,
        process=process_scorer(run) if section.step_coef > 0 else None,
    )


def _record_errors(session: Session, errors: tuple[RewardError, ...], step: int) -> None:
    """Keeps the first reward functions' errors in the stage's note, and says how many there are.

    Raises:
      DataError: a function raised on every completion of the first iteration: it is wrong, or reads a column that the
        data lack, and nothing would be learned from it.
    """
    if errors:
        name, count = Counter(error.name for error in errors).most_common(1)[0]
        if step == 1 and count >= session.learner.spent.completions_sampled:
            found = next(error.error for error in errors if error.name == name)
            raise DataError(
                f"reward function {name}: raised on all {count} completions of the first iteration ({found})"
            )
        kept = session.note.setdefault("reward_errors", [])
        kept += [error._asdict() for error in errors][: max(0, _ERRORS - len(kept))]
        first = errors[0]
        session.say(
            f"reward function {first.name}: raised on prompt {first.prompt_id} ({first.error}); {len(errors)} such "
            "errors in this iteration"
        )


def _prompts(run: StageRun, problems: Selected) -> tuple[Any, DataReport]:
    """The iterator of prompts, filtered by difficulty where the stage says so, and what became of their records."""
    stage, how, interaction = run.stage, run.stage.rollout, run.setup.interaction
    pipeline = prompt_batches(
        problems if interaction is None else interaction.prompts(problems),
        run.sources.tokenizer,
        prompts_per_batch=how.prompts_per_step,
        max_prompt_length=how.max_prompt_length,
        seed=stage.seed,
        name=stage.name,
        limits=run.sources.limits,
    )
    if not how.curriculum:
        return iter(pipeline), pipeline.report
    band = (how.curriculum_low, how.curriculum_high)
    curriculum = Curriculum(len(problems), band=band, decay=how.curriculum_decay, retry=how.curriculum_retry)
    size = how.prompts_per_step
    filtered = CurriculumSampler(
        iter(pipeline), curriculum, batch_size=size, max_skipped=_PATIENCE * size, seed=stage.seed
    )
    return filtered, pipeline.report


def _iterate(session: Session, state: OnlineState, step: int) -> tuple[dict[str, Any], int]:
    run, stage, learner = session.run, session.run.stage, session.learner
    collected = state.collector.collect(learner.policy, session.data, learner.spent, step)
    _record_errors(session, collected.errors, step)
    rollouts = collected.rollouts
    seed = int(np.random.SeedSequence((stage.seed, step)).generate_state(1)[0])
    batch, chosen = learner.algorithm.from_rollouts(rollouts, seed)
    metrics: dict[str, Any] = {**rollout_metrics(collected), **chosen}
    tokens, counts = int(rollouts.lengths.sum()), count_tokens(batch)
    shown = step % stage.log_every == 0 or step in (1, stage.steps)
    prepared: Batch | None = learner.prepare(batch, counts) if counts["target_tokens"] else None
    kl: dict[str, Array] = {}
    if isinstance(prepared, RolloutBatch) and prepared.ref_logps is not None:
        kl = _kl(prepared.completion_mask, prepared.sampler_logps, prepared.ref_logps)
    elif shown and stage.rollout.monitor_kl and stage.start:
        sampled = to_device(run.mesh, rollout_batch(rollouts, mask_truncated=False))
        kl = _reference_kl(_start(learner, state), sampled, stage.rollout.temperature)
    metrics |= {name: float(value) for name, value in jax.device_get(kl).items()}
    if prepared is not None:
        learned, trained = _learn(session, batch, prepared, step)
        metrics |= learned
        tokens += trained
        learner.adapt(metrics, len(rollouts.rewards))
    metrics |= state.monitors.update(jax.device_get(metrics))
    if shown:
        session.writer.write_samples(step, shown_samples(collected))
    return metrics, tokens


def _start(learner: Learner, state: OnlineState) -> Network:
    """The policy that the stage started from."""
    if not learner.moved:
        return Network(learner.policy, learner.run.model)
    if state.reference is None:
        state.reference = learner.frozen().reference or learner.run.result_of(learner.run.stage.start).policy
    return state.reference


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
                updates.append(session.update(step, part, counts))
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
    ref = batch_logps(reference, batch.sequences, temperature)
    return _kl(batch.completion_mask, batch.sampler_logps, ref.logps)
