"""Batches of judged solutions, on Grain: labelled steps, rankings, and completions that are each good or bad.

They come as those of `research.data.pipelines` do: training pipelines never end and resume bit for bit, and
`*_eval_batches` are one ordered pass whose last batch is filled with rows of segment 0.

Legend: B rows, T row length, P prompts, K candidates.
"""

from functools import partial
from typing import Literal

import grain
import numpy as np

from research.data.examples import (
    JudgedExamples,
    RankedExamples,
    Records,
    StepExamples,
    judged_examples,
    ranked_examples,
    step_examples,
)
from research.data.packing import Row, assemble_row, empty_row
from research.data.pipelines import Pipeline, batched, check_shape, ordered
from research.data.streams import Finite, MismatchedStream, PermutedStream, stack_padded
from research.data.tokenizer import Tokenizer

Labels = Literal["steps", "outcome"]


def step_batches(
    source: Records,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    seed: int,
    labels: Labels = "steps",
    name: str = "steps",
) -> Pipeline:
    """Batches {tokens, loss_mask, step_labels, segment_ids, positions}, each [B, T].

    `loss_mask` is True at the last token of each labelled step (`steps.step_end_mask`), where `step_labels`,
    float32, holds the probability that the step is right; 0 elsewhere. `labels` "outcome" keeps the last label
    alone, at the solution's end.
    """
    check_shape(name, batch_size=batch_size, length=length, seed=seed)
    examples = step_examples(source, tokenizer, length=length, labels=labels, name=name)
    stream = PermutedStream(
        len(examples.labels), partial(_step_row, examples, length, tokenizer.pad_id), seed
    )
    return Pipeline(batched(grain.MapDataset.source(stream), batch_size), examples.rows.report)


def step_eval_batches(
    source: Records,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    labels: Labels = "steps",
    name: str = "steps",
) -> Pipeline:
    """One pass of `step_batches` rows in order."""
    check_shape(name, batch_size=batch_size, length=length)
    examples = step_examples(source, tokenizer, length=length, labels=labels, name=name)
    rows = Finite(len(examples.labels), partial(_step_row, examples, length, tokenizer.pad_id))
    empty = {**empty_row(length, tokenizer.pad_id), "step_labels": np.zeros(length, np.float32)}
    return ordered(rows, batch_size, empty, examples.rows.report)


def unpaired_batches(
    source: Records,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    seed: int,
    name: str = "unpaired",
) -> Pipeline:
    """Batches {tokens, loss_mask, segment_ids, positions} [B, T], the same with the prefix `kl_`, and
    `desirable` [B] bool.

    A preference pair gives two rows, which are drawn apart. The `kl_` rows hold this row's prompt and another
    prompt's completion: that of the next row, or of the first after it that answers another prompt.

    Source: Ethayarajh et al. 2024, Section 4.1 (the KL is estimated on mismatched outputs of the batch).
    """
    check_shape(name, batch_size=batch_size, length=length, seed=seed)
    examples = judged_examples(source, tokenizer, length=length, name=name)
    row = partial(_judged_row, examples, length, tokenizer.pad_id)
    stream = MismatchedStream(examples.prompt_ids, row, seed)
    return Pipeline(batched(grain.MapDataset.source(stream), batch_size), examples.rows.report)


def unpaired_eval_batches(
    source: Records, tokenizer: Tokenizer, *, batch_size: int, length: int, name: str = "unpaired"
) -> Pipeline:
    """One pass of `unpaired_batches` rows in order; the last row's `kl_` completion is from the first ones."""
    check_shape(name, batch_size=batch_size, length=length)
    examples = judged_examples(source, tokenizer, length=length, name=name)
    row = partial(_judged_row, examples, length, tokenizer.pad_id)
    stream = MismatchedStream(examples.prompt_ids, row, None)
    empty = empty_row(length, tokenizer.pad_id)
    empty |= {**{f"kl_{key}": value for key, value in empty.items()}, "desirable": np.zeros((), np.bool_)}
    return ordered(
        Finite(len(examples.desirable), stream.__getitem__), batch_size, empty, examples.rows.report
    )


def ranking_batches(
    source: Records,
    tokenizer: Tokenizer,
    *,
    prompts_per_batch: int,
    candidates: int,
    length: int,
    seed: int,
    name: str = "rankings",
) -> Pipeline:
    """Batches {tokens, loss_mask, segment_ids, positions} [P, K, T] and `ranks` [P, K] int32, 0 the best.

    K = `candidates`; shorter rankings are filled up with rows of segment 0 and rank K. A preference pair is a
    ranking of two.
    """
    check_shape(name, prompts_per_batch=prompts_per_batch, candidates=candidates, length=length, seed=seed)
    examples = ranked_examples(source, tokenizer, length=length, candidates=candidates, name=name)
    row = partial(_ranking_row, examples, candidates, length, tokenizer.pad_id)
    stream = PermutedStream(len(examples.ranks), row, seed)
    return Pipeline(batched(grain.MapDataset.source(stream), prompts_per_batch), examples.report)


def ranking_eval_batches(
    source: Records,
    tokenizer: Tokenizer,
    *,
    prompts_per_batch: int,
    candidates: int,
    length: int,
    name: str = "rankings",
) -> Pipeline:
    """One pass of `ranking_batches` rows in order."""
    check_shape(name, prompts_per_batch=prompts_per_batch, candidates=candidates, length=length)
    examples = ranked_examples(source, tokenizer, length=length, candidates=candidates, name=name)
    row = partial(_ranking_row, examples, candidates, length, tokenizer.pad_id)
    blank = stack_padded([], batch_size=candidates, empty=empty_row(length, tokenizer.pad_id))
    empty = {**blank, "ranks": np.full(candidates, candidates, np.int32)}
    return ordered(Finite(len(examples.ranks), row), prompts_per_batch, empty, examples.report)


def _step_row(examples: StepExamples, length: int, pad_id: int, index: int) -> Row:
    row = assemble_row([examples.rows.tokens[index]], [examples.rows.loss_masks[index]], length, pad_id)
    labels = np.zeros(length, np.float32)
    labels[: len(examples.labels[index])] = examples.labels[index]
    return {**row, "step_labels": labels}


def _judged_row(examples: JudgedExamples, length: int, pad_id: int, index: int, other: int) -> Row:
    (prompt, _), (_, completion) = examples.parts(index), examples.parts(other)
    mixed = np.concatenate([prompt, completion])[:length]
    row = assemble_row([examples.rows.tokens[index]], [examples.rows.loss_masks[index]], length, pad_id)
    kl_row = assemble_row([mixed], [np.arange(len(mixed)) >= len(prompt)], length, pad_id)
    kl_named = {f"kl_{key}": value for key, value in kl_row.items()}
    return {**row, **kl_named, "desirable": examples.desirable[index]}


def _ranking_row(examples: RankedExamples, candidates: int, length: int, pad_id: int, index: int) -> Row:
    rows = [assemble_row([tokens], [mask], length, pad_id) for tokens, mask in examples.candidates[index]]
    ranks = np.full(candidates, candidates, np.int32)
    ranks[: len(rows)] = examples.ranks[index]
    return {**stack_padded(rows, batch_size=candidates, empty=empty_row(length, pad_id)), "ranks": ranks}
