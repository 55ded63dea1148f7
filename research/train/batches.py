"""The data of a stage that learns from given data: its pipelines, and their arrays as the algorithm's batches."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import numpy as np

from research.algorithms.base import Algorithm
from research.config.experiment import Stage
from research.core.batch import Batch, PreferenceBatch, RankingBatch, SequenceBatch, StepBatch, UnpairedBatch, rows_of
from research.data.judged import JudgedKind, judged_batches
from research.data.pipelines import Pipeline, sft_batches, text_batches
from research.data.records import Records, first_records
from research.tasks.sources import Sources, worked_text


def training_batches(stage: Stage, sources: Sources) -> Pipeline:
    """The endless, shuffled training data of an offline stage."""
    tokenizer, kind = sources.tokenizer, stage.objective.given
    shape: dict[str, Any] = {"batch_size": stage.batch_size, "length": stage.length, "seed": stage.seed}
    shape["name"] = stage.name
    if kind == "text":
        parts: list[Any] = []
        weights = []
        if stage.data.text_weight > 0:
            parts.append(sources.text.train)
            weights.append(stage.data.text_weight)
        if stage.data.problems_weight > 0:
            parts.append(first_records(sources.problems.train, stage.data.limit, worked_text))
            weights.append(stage.data.problems_weight)
        return text_batches(parts, tokenizer, weights=weights, **shape)
    if kind == "chat":
        shape["limits"] = sources.limits
        change = _transform(stage) or dict
        records = first_records(sources.problems.train, stage.data.limit, change)
        if "teacher" not in stage.facts.roles:
            return sft_batches(records, tokenizer, packing=stage.data.packing, **shape)
        return sft_batches(records, tokenizer, packing=False, bucket_lengths=(stage.length,), **shape)
    return _judged_batches(stage, sources, train=True)


def validation_batches(stage: Stage, sources: Sources) -> Pipeline:
    """One ordered pass over held-out data of the same kind."""
    tokenizer, kind = sources.tokenizer, stage.objective.given
    shape: dict[str, Any] = {"batch_size": stage.batch_size, "length": stage.length, "seed": None}
    shape["name"] = _held_out(stage)
    if kind == "text":
        text = stage.data.text_weight > 0
        records = sources.text.validation if text else first_records(sources.held_out, 0, worked_text)
        return text_batches([records], tokenizer, **shape)
    if kind == "chat":
        return sft_batches(sources.held_out, tokenizer, limits=sources.limits, **shape)
    return _judged_batches(stage, sources, train=False)


def _judged_batches(stage: Stage, sources: Sources, *, train: bool) -> Pipeline:
    kind = cast(JudgedKind, stage.objective.given)
    found = sources.prepared(kind)
    records: Records = found.train if train else found.validation
    change = _transform(stage)
    if change is not None:
        records = first_records(records, 0, change)
    return judged_batches(
        kind,
        records,
        sources.tokenizer,
        batch_size=stage.batch_size,
        length=stage.length,
        seed=stage.seed if train else None,
        name=stage.name if train else _held_out(stage),
        limits=sources.limits,
        candidates=sources.section.rankings.candidates,
    )


def _held_out(stage: Stage) -> str:
    """What messages call the stage's validation data."""
    return f"{stage.name}, held out"


def _transform(stage: Stage) -> Callable[[Mapping[str, Any]], Mapping[str, Any]] | None:
    chosen = stage.chosen("data", "transform")
    return chosen[0].make() if chosen else None


def as_batch(stage: Stage, algorithm: Algorithm, arrays: Mapping[str, np.ndarray]) -> Batch:
    """A pipeline's arrays as the algorithm's batch; rows that only fill it (no target at all) get weight 0."""
    kind, read = stage.objective.given, partial(SequenceBatch.from_arrays, arrays)
    if kind == "preferences":
        pair = {side: read(f"{side}_") for side in ("chosen", "rejected")}
        return PreferenceBatch(margins=arrays["margins"], soft_labels=arrays["soft_labels"], **pair)
    if kind == "unpaired":
        return UnpairedBatch(read(), read("kl_"), desirable=arrays["desirable"])
    if kind == "steps":
        return StepBatch(read(), step_labels=arrays["step_labels"])
    if kind == "rankings":
        return RankingBatch(read(), ranks=arrays["ranks"])
    return algorithm.from_rows(read())


def count_tokens(batch: Batch) -> dict[str, Any]:
    """What an update on this host batch spends; see `Spending.trained`."""
    target = real = context = 0
    for rows in rows_of(batch):
        used = rows.weights > 0
        seen = rows.segment_ids[used] > 0
        target += int(rows.loss_mask[used].sum())
        real += int(seen.sum())
        context += int(rows.positions[used][seen].sum())
    return {"target_tokens": target, "real_tokens": real, "context": context / max(real, 1)}
