"""The data of a stage that learns from given data: its pipelines, and their arrays as the algorithm's batches."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import numpy as np

from research.algorithms.base import Algorithm
from research.config.experiment import Stage
from research.core.batch import Batch, PreferenceBatch, RankingBatch, SequenceBatch, StepBatch, UnpairedBatch, rows_of
from research.data.judged import JudgedKind, judged_batches
from research.data.pipelines import Pipeline, sft_batches, sft_eval_batches, text_batches, text_eval_batches
from research.data.records import Records
from research.tasks.sources import Sources, View, worked_text


def training_batches(stage: Stage, sources: Sources) -> Pipeline:
    """The endless, shuffled training data of an offline stage."""
    kind, how, tokenizer = stage.objective.given, stage.data, sources.tokenizer
    shape = {**_shape(stage), "seed": stage.seed}
    if kind == "text":
        parts: list[tuple[float, Any]] = []
        if how.text_weight > 0:
            parts.append((how.text_weight, sources.text.train))
        if how.problems_weight > 0:
            parts.append((how.problems_weight, View(sources.problems.train, how.limit, worked_text)))
        return text_batches([part for _, part in parts], tokenizer, weights=[weight for weight, _ in parts], **shape)
    if kind == "chat":
        records = View(sources.problems.train, how.limit, _transform(stage) or dict)
        if "teacher" in stage.facts.roles:
            shape |= {"packing": False, "bucket_lengths": (stage.length,)}
        return sft_batches(records, tokenizer, limits=sources.limits, **{"packing": how.packing, **shape})
    return _judged_batches(stage, sources, train=True)


def validation_batches(stage: Stage, sources: Sources) -> Pipeline:
    """One ordered pass over held-out data of the same kind."""
    kind, shape, tokenizer = stage.objective.given, _shape(stage), sources.tokenizer
    if kind == "text":
        held_out = sources.text.validation if stage.data.text_weight > 0 else View(sources.held_out, 0, worked_text)
        return text_eval_batches(held_out, tokenizer, **shape)
    if kind == "chat":
        return sft_eval_batches(sources.held_out, tokenizer, limits=sources.limits, **shape)
    return _judged_batches(stage, sources, train=False)


def _shape(stage: Stage) -> dict[str, Any]:
    return {"batch_size": stage.batch_size, "length": stage.length, "name": stage.name}


def _judged_batches(stage: Stage, sources: Sources, *, train: bool) -> Pipeline:
    kind = cast(JudgedKind, stage.objective.given)
    found = sources.prepared(kind)
    records: Records = found.train if train else found.validation
    if (change := _transform(stage)) is not None:
        records = View(records, 0, change)
    return judged_batches(
        kind,
        records,
        sources.tokenizer,
        seed=stage.seed if train else None,
        limits=sources.limits,
        candidates=sources.section.rankings.candidates,
        **_shape(stage),
    )


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
