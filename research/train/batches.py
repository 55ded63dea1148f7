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
    return _batches(stage, sources, stage.seed)


def validation_batches(stage: Stage, sources: Sources) -> Pipeline:
    """One ordered pass over held-out data of the same kind."""
    return _batches(stage, sources, None)


def _batches(stage: Stage, sources: Sources, seed: int | None) -> Pipeline:
    """Of training data with a seed, of held-out data without one."""
    kind, how, train = stage.objective.given, stage.data, seed is not None
    name = stage.name if train else f"{stage.name}, held out"
    shape: dict[str, Any] = {"batch_size": stage.batch_size, "length": stage.length, "seed": seed, "name": name}
    if kind == "text":
        parts: list[tuple[float, Records]] = []
        if how.text_weight > 0:
            parts.append((how.text_weight, sources.text.train if train else sources.text.validation))
        if how.problems_weight > 0 and (train or not parts):
            problems, limit = (sources.problems.train, how.limit) if train else (sources.held_out, 0)
            parts.append((how.problems_weight, first_records(problems, limit, worked_text)))
        weights, records = zip(*parts, strict=True)
        return text_batches(records, sources.tokenizer, weights=weights, **shape)
    if kind == "chat":
        shape |= {"limits": sources.limits}
        if not train:
            return sft_batches(sources.held_out, sources.tokenizer, **shape)
        shape |= {"packing": how.packing}
        if "teacher" in stage.facts.roles:
            shape |= {"packing": False, "bucket_lengths": (stage.length,)}
        examples = first_records(sources.problems.train, how.limit, _transform(stage) or dict)
        return sft_batches(examples, sources.tokenizer, **shape)
    judged = cast(JudgedKind, kind)
    found = sources.prepared(judged)
    chosen: Records = found.train if train else found.validation
    if (change := _transform(stage)) is not None:
        chosen = first_records(chosen, 0, change)
    candidates = sources.section.rankings.candidates
    return judged_batches(judged, chosen, sources.tokenizer, limits=sources.limits, candidates=candidates, **shape)


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
