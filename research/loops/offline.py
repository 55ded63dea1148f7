"""The loop over given data: pretraining, SFT, DPO on a file of pairs."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from objectives.types import WeightedSum
from research.batch import Batch, PreferenceBatch, SequenceBatch
from research.config import Stage
from research.data.pipelines import (
    Pipeline,
    preference_batches,
    preference_eval_batches,
    sft_batches,
    sft_eval_batches,
    text_eval_batches,
    text_mixture_batches,
)
from research.loops.problems import problem_metrics
from research.loops.session import Session, StageRun, due
from research.mesh import to_device
from research.sources import Sources, View, terse, worked_text
from research.step import eval_step, reference_step, train_step


def run_offline(run: StageRun) -> dict[str, Any]:
    """Runs a stage to its end, from wherever it was; returns its result."""
    stage = run.stage
    pipeline = training_batches(stage, run.sources)
    with Session(run, iter(pipeline)) as session:
        session.note.setdefault("data", dict(pipeline.report))
        reference = run.initial_params() if session.algorithm.needs_reference else None
        if stage.eval_every and not session.curve:
            session.evaluate(0, partial(_evaluate, session, reference))
        for step in range(session.done + 1, stage.steps + 1):
            batch, counts = _next_batch(session, reference)
            session.state, metrics = train_step(
                session.state,
                batch,
                session.scalars,
                algorithm=session.algorithm,
                config=run.model,
                micro_batches=stage.micro_batches,
            )
            session.spent.trained(**counts)
            session.log(step, metrics, tokens=counts["real_tokens"])
            if due(step, stage.eval_every, stage.steps):
                session.evaluate(step, partial(_evaluate, session, reference))
            session.save(step)
        final: dict[str, float] = {}
        session.evaluate(stage.steps, partial(_evaluate, session, reference, final))
        return session.finish(final)


def training_batches(stage: Stage, sources: Sources) -> Pipeline:
    """The endless, shuffled training data of an offline stage."""
    shape: dict[str, Any] = {"batch_size": stage.batch_size, "length": stage.length, "seed": stage.seed}
    if stage.objective == "next_token":
        parts: list[Any] = []
        weights = []
        if stage.data.text_weight > 0:
            parts.append(sources.text.train)
            weights.append(stage.data.text_weight)
        if stage.data.problems_weight > 0:
            parts.append(View(sources.problems.train, stage.data.limit, worked_text))
            weights.append(stage.data.problems_weight)
        return text_mixture_batches(parts, sources.tokenizer, weights=weights, name=stage.name, **shape)
    if stage.objective == "sft":
        change = terse(stage.data.terse_fraction) if stage.data.terse_fraction else dict
        records = View(sources.problems.train, stage.data.limit, change)
        return sft_batches(records, sources.tokenizer, packing=stage.data.packing, name=stage.name, **shape)
    return preference_batches(sources.preferences.train, sources.tokenizer, name=stage.name, **shape)


def validation_batches(stage: Stage, sources: Sources) -> Pipeline:
    """One ordered pass over held-out data of the same kind."""
    shape: dict[str, Any] = {"batch_size": stage.batch_size, "length": stage.length, "name": stage.name}
    if stage.objective == "next_token":
        if stage.data.text_weight > 0:
            return text_eval_batches(sources.text.validation, sources.tokenizer, **shape)
        return text_eval_batches(View(sources.held_out, 0, worked_text), sources.tokenizer, **shape)
    if stage.objective == "sft":
        return sft_eval_batches(sources.held_out, sources.tokenizer, **shape)
    return preference_eval_batches(sources.preferences.validation, sources.tokenizer, **shape)


def as_batch(arrays: Mapping[str, np.ndarray]) -> SequenceBatch | PreferenceBatch:
    """A pipeline's arrays as a batch; rows that only fill it (no target at all) get weight 0."""
    if "tokens" in arrays:
        weights = arrays["loss_mask"].any(axis=1).astype(np.float32)
        return SequenceBatch(weights=weights, **{key: arrays[key] for key in _ROW_KEYS})
    sides: dict[str, Any] = {
        side: as_batch({key: arrays[f"{side}_{key}"] for key in _ROW_KEYS}) for side in ("chosen", "rejected")
    }
    zeros = np.zeros(len(arrays["chosen_tokens"]), np.float32)
    return PreferenceBatch(ref_chosen_logps=zeros, ref_rejected_logps=zeros, **sides)


_ROW_KEYS = ("tokens", "loss_mask", "segment_ids", "positions")


def count_tokens(batch: Batch) -> dict[str, Any]:
    """What an update on this host batch spends; see `Spending.trained`."""
    if isinstance(batch, PreferenceBatch):
        rows = [batch.chosen, batch.rejected]
    else:
        rows = [batch if isinstance(batch, SequenceBatch) else batch.sequences]
    used = [r.weights > 0 for r in rows]
    real = sum(int((r.segment_ids[u] > 0).sum()) for r, u in zip(rows, used, strict=True))
    context = sum(int(r.positions[u][r.segment_ids[u] > 0].sum()) for r, u in zip(rows, used, strict=True))
    return {
        "target_tokens": sum(int(r.loss_mask[u].sum()) for r, u in zip(rows, used, strict=True)),
        "real_tokens": real,
        "context": context / max(real, 1),
    }


def _next_batch(session: Session, reference: Any) -> tuple[Batch, dict[str, Any]]:
    batch = as_batch(next(session.data))
    counts = count_tokens(batch)
    if reference is not None:
        session.spent.referenced(real_tokens=counts["real_tokens"], context=counts["context"])
    return _with_reference(session, to_device(session.run.mesh, batch), reference), counts


def _with_reference(session: Session, batch: Batch, reference: Any) -> Batch:
    if reference is None:
        return batch
    return reference_step(
        reference,
        batch,
        session.scalars.objective,
        algorithm=session.algorithm,
        config=session.run.model,
    )


def _evaluate(session: Session, reference: Any, final: dict[str, float] | None = None) -> dict[str, float]:
    """Validation loss and metrics and, but for plain text, the accuracy on held-out problems.

    Returns a point of the learning curve; fills `final`, where given, with the final evaluation.
    """
    run = session.run
    metrics = validation_metrics(session, validation_batches(run.stage, run.sources), reference)
    metrics["alarm/overfitting"] = overfitting([*session.curve, metrics])
    if final is not None:
        final.update(metrics)
    if run.stage.objective != "next_token":
        metrics.update(problem_metrics(run, session.state.params, final))
    return metrics


def overfitting(curve: Sequence[Mapping[str, float]]) -> float:
    """1.0 where the validation loss has risen at each of the last two evaluations, else 0.0."""
    losses = [point["eval/loss"] for point in curve if "eval/loss" in point]
    return float(len(losses) >= 3 and losses[-1] > losses[-2] > losses[-3])


def validation_metrics(
    session: Session, batches: Iterable[Mapping[str, np.ndarray]], reference: Any
) -> dict[str, float]:
    """Means over the first `eval_batches` batches of held-out data, divided once."""
    run = session.run
    sums: dict[str, WeightedSum] = {}
    for index, arrays in enumerate(batches):
        if index == run.stage.eval_batches:
            break
        batch = _with_reference(session, to_device(run.mesh, as_batch(arrays)), reference)
        part = eval_step(
            session.state.params,
            batch,
            session.scalars.objective,
            algorithm=session.algorithm,
            config=run.model,
        )
        sums = part if not sums else {key: sums[key] + value for key, value in part.items()}
    fetched = jax.device_get(sums)
    return {
        f"eval/{key}": float(value.total / max(float(value.count), 1e-8)) for key, value in fetched.items()
    }
