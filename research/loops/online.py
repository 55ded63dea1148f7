"""The loop over the policy's own samples: rejection sampling, DPO on own pairs, GRPO."""

from typing import Any

import numpy as np

from research.algorithms.base import Rollouts
from research.batch import PreferenceBatch, RolloutBatch, SequenceBatch
from research.data.pipelines import prompt_batches
from research.loops.offline import count_tokens
from research.loops.problems import (
    Decoded,
    problem_metrics,
    sample_prompts,
    sampler_scalars,
    sampler_spec,
)
from research.loops.session import Session, StageRun, due, iteration_seed
from research.mesh import to_device
from research.rewards.verifiers import get_verifier, score
from research.sources import View, answer_of, question_of
from research.step import reference_step, train_step

TRUNCATED_BOUND = 0.25
"""Share of completions cut at their limit above which an alarm line is printed."""

_SHOWN = 4
"""Prompts of each logged iteration whose first completion goes into samples.jsonl."""


def run_online(run: StageRun) -> dict[str, Any]:
    """Runs a stage to its end, from wherever it was; returns its result.

    One iteration: draw prompts, sample G completions of each, verify them, build a batch on the host, take
    `updates` optimizer steps on it. A checkpoint falls between iterations, so no rollout is ever in flight.
    """
    stage = run.stage
    problems = View(run.sources.problems.train, stage.data.limit)
    pipeline = prompt_batches(
        problems,
        run.sources.tokenizer,
        prompts_per_batch=stage.rollout.prompts_per_step,
        max_prompt_length=stage.rollout.max_prompt_length,
        seed=stage.seed,
        name=stage.name,
    )
    with Session(run, iter(pipeline)) as session:
        reference = run.initial_params() if session.algorithm.needs_reference else None

        def measure(final: dict[str, float] | None = None) -> dict[str, float]:
            return problem_metrics(run, session.state.params, final)

        if not session.curve:
            session.evaluate(0, measure)
        for step in range(session.done + 1, stage.steps + 1):
            metrics, tokens = _iterate(session, problems, reference, step)
            session.log(step, metrics, tokens=tokens)
            if due(step, stage.eval_every, stage.steps):
                session.evaluate(step, measure)
            session.save(step)
        final: dict[str, float] = {}
        session.evaluate(stage.steps, lambda: measure(final))
        return session.finish(final)


def _iterate(session: Session, problems: View, reference: Any, step: int) -> tuple[dict[str, Any], int]:
    run, stage = session.run, session.run.stage
    prompts = next(session.data)
    spec = sampler_spec(
        run.sources.tokenizer,
        samples=stage.rollout.group_size,
        max_new_tokens=stage.rollout.max_new_tokens,
        method=stage.rollout.method,
    )
    scalars = sampler_scalars(
        seed=stage.seed, step=step, temperature=stage.rollout.temperature, top_p=stage.rollout.top_p
    )
    out = sample_prompts(
        session.state.params,
        prompts,
        scalars,
        model=run.model,
        spec=spec,
        mesh=run.mesh,
        tokenizer=run.sources.tokenizer,
    )
    G = stage.rollout.group_size
    answers = [answer_of(problems[int(index)]) for index in prompts["prompt_id"]]
    verifier = get_verifier(run.sources.section["problems"]["verifier"])
    rewards = score(out.texts, [answer for answer in answers for _ in range(G)], verifier)
    rewards = np.where(out.stopped, rewards, np.float32(0.0))  # an answer that never ends is not right
    rollouts = Rollouts(
        prompt_tokens=np.repeat(prompts["prompt_tokens"], G, axis=0),
        prompt_mask=np.repeat(prompts["prompt_mask"], G, axis=0),
        tokens=out.arrays.tokens,
        mask=out.arrays.mask,
        sampler_logps=out.arrays.sampler_logps,
        stopped=out.stopped,
        rewards=rewards,
        prompt_ids=np.repeat(prompts["prompt_id"], G),
        group_size=G,
    )
    drawn, asked = int(rollouts.lengths.sum()), int(prompts["prompt_mask"].sum())
    context = float(rollouts.prompt_mask.sum(axis=1).mean() + rollouts.lengths.mean()) / 2
    session.spent.sampled(completions=len(rewards), tokens=drawn, prompt_tokens=asked, context=context)
    batch, chosen = session.algorithm.from_rollouts(rollouts, iteration_seed(stage.seed, step))
    metrics: dict[str, Any] = {**rollout_metrics(rollouts), **chosen}
    tokens = drawn
    if _weights(batch).any():
        counts = count_tokens(batch)
        device_batch = to_device(run.mesh, batch)
        if reference is not None:
            session.spent.referenced(real_tokens=counts["real_tokens"], context=counts["context"])
            device_batch = reference_step(
                reference,
                device_batch,
                session.scalars.objective,
                algorithm=session.algorithm,
                config=run.model,
            )
        for number in range(stage.rollout.updates):
            session.state, update = train_step(
                session.state,
                device_batch,
                session.scalars,
                algorithm=session.algorithm,
                config=run.model,
                micro_batches=stage.micro_batches,
            )
            session.spent.trained(**counts)
            tokens += counts["real_tokens"]
            # Of the first update, before the policy has moved; the others' say how far it has.
            gap = update.pop("sampler_trainer_gap", None)
            metrics.update(update)
            if number == 0 and gap is not None:
                metrics["sampler_trainer_gap"] = gap
    if step % stage.log_every == 0 or step in (1, stage.steps):
        _write_samples(session, step, problems, prompts["prompt_id"], out, rewards)
    return metrics, tokens


def rollout_metrics(rollouts: Rollouts) -> dict[str, float]:
    """What every online run logs about its samples, whatever it learns from them."""
    lengths, right = rollouts.lengths, rollouts.rewards >= 1.0
    groups = rollouts.rewards.reshape(-1, rollouts.group_size)
    metrics = {
        "reward/mean": float(rollouts.rewards.mean()),
        "reward/std": float(rollouts.rewards.std()),
        "reward/best_of_group": float(groups.max(axis=1).mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/truncated_fraction": float(1.0 - rollouts.stopped.mean()),
        "sampler_entropy_estimate": float(-rollouts.sampler_logps.sum() / max(lengths.sum(), 1)),
    }
    metrics["alarm/truncated"] = float(metrics["completions/truncated_fraction"] > TRUNCATED_BOUND)
    for name, rows in (("right", right), ("wrong", ~right)):
        if rows.any():
            metrics[f"completions/mean_length_{name}"] = float(lengths[rows].mean())
    return metrics


def _weights(batch: Any) -> np.ndarray:
    if isinstance(batch, PreferenceBatch):
        return batch.chosen.weights
    rows: SequenceBatch = batch.sequences if isinstance(batch, RolloutBatch) else batch
    return np.asarray(rows.weights)


def _write_samples(
    session: Session, step: int, problems: View, prompt_ids: np.ndarray, out: Decoded, rewards: np.ndarray
) -> None:
    G = session.run.stage.rollout.group_size
    samples = []
    for row, prompt_id in enumerate(prompt_ids[:_SHOWN]):
        first = row * G
        samples.append(
            {
                "prompt": question_of(problems[int(prompt_id)]),
                "completion": out.texts[first],
                "reward": float(rewards[first]),
                "stopped": bool(out.stopped[first]),
                "sampler_logps": float(out.arrays.sampler_logps[first].sum()),
            }
        )
    session.writer.write_samples(step, samples)
