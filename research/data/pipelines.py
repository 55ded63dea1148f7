"""Batches for training and evaluation, on Grain.

Training pipelines never end and draw a new order each epoch. A batch is a pure function of (records, seed,
batch number), so an iterator's state is one small JSON-serialisable dict and a restored iterator continues
bit for bit:

    batches = iter(sft_batches(source, tokenizer, batch_size=32, length=256, seed=0, packing=True))
    state = batches.get_state();  ...;  batches.set_state(state)

Legend: B rows, T row length, P prompts, L prompt length. Rows are those of `research.data.packing`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import grain
import numpy as np

from research.core.errors import DataError
from research.data.examples import (
    PairExamples,
    Records,
    Report,
    preference_examples,
    prompt_tokens,
    sft_examples,
    text_documents,
)
from research.data.packing import Row, assemble_row, empty_row
from research.data.streams import (
    BucketStream,
    Finite,
    PackedStream,
    PermutedStream,
    PromptStream,
    TextStream,
    stack_padded,
)
from research.data.tokenizer import Tokenizer

_INLINE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # a batch costs less than a thread hop


@dataclass(frozen=True)
class Pipeline:
    """Batches, and what preparing them found: how many examples were kept, truncated, left out."""

    dataset: grain.IterDataset
    report: Report

    def __iter__(self) -> grain.DatasetIterator:
        """A fresh iterator with `get_state()` and `set_state(state)`."""
        return iter(self.dataset)


def text_batches(
    source: Records, tokenizer: Tokenizer, *, batch_size: int, length: int, seed: int, name: str = "text"
) -> Pipeline:
    """Pretraining batches {tokens, loss_mask, segment_ids, positions}, each [B, T], of {text} records.

    Documents are cut, concatenated and split into full rows (`packing.concat_then_split`), from a new phase
    each epoch.
    """
    return text_mixture_batches(
        [source], tokenizer, weights=[1.0], batch_size=batch_size, length=length, seed=seed, name=name
    )


def text_mixture_batches(
    sources: Sequence[Records],
    tokenizer: Tokenizer,
    *,
    weights: Sequence[float],
    batch_size: int,
    length: int,
    seed: int,
    name: str = "text",
) -> Pipeline:
    """`text_batches` from several sources: each row is from one source, in proportion to `weights`."""
    check_shape(name, batch_size=batch_size, length=length, seed=seed)
    if not sources or len(weights) != len(sources) or min(weights) <= 0:
        raise DataError(
            f"{name}: got {len(sources)} sources with weights {list(weights)}, "
            "expected one positive weight each."
        )
    names = [name] if len(sources) == 1 else [f"{name}[{index}]" for index in range(len(sources))]
    stores = [text_documents(part, tokenizer, name=each) for part, each in zip(sources, names, strict=True)]
    streams = [
        grain.MapDataset.source(TextStream(store, length, (seed, index), tokenizer.pad_id))
        for index, store in enumerate(stores)
    ]
    rows = streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, list(weights))
    report = {key: sum(store.report[key] for store in stores) for key in stores[0].report}
    return Pipeline(batched(rows, batch_size), report)


def sft_batches(
    source: Records,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    seed: int,
    packing: bool,
    bucket_lengths: Sequence[int] | None = None,
    name: str = "sft",
) -> Pipeline:
    """Batches {tokens, loss_mask, segment_ids, positions}, each [B, T], with loss on responses only.

    With `packing`, T = `length` and whole examples share rows. Without it, one example a row, and examples of
    like length share a batch whose T is one of `bucket_lengths` (default: a quarter, half and all of
    `length`), so there are that many shapes to compile.
    """
    check_shape(name, batch_size=batch_size, length=length, seed=seed)
    examples = sft_examples(source, tokenizer, length=length, name=name)
    if packing:
        if bucket_lengths is not None:
            raise DataError(f"{name}: bucket_lengths has no effect with packing, expected it only without.")
        packed = grain.MapDataset.source(PackedStream(examples, length, seed, tokenizer.pad_id))
        return Pipeline(batched(packed, batch_size), examples.report)
    buckets = sorted({length, *(bucket_lengths or (max(1, length // 4), max(1, length // 2)))})
    if buckets[-1] > length or buckets[0] < 1:
        raise DataError(f"{name}: bucket_lengths is {buckets}, expected values from 1 to length = {length}.")
    stream = BucketStream(examples, batch_size, buckets, seed, tokenizer.pad_id)
    return Pipeline(grain.MapDataset.source(stream).to_iter_dataset(_INLINE), examples.report)


def preference_batches(
    source: Records,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    seed: int,
    name: str = "preferences",
) -> Pipeline:
    """Batches {chosen,rejected}_{tokens,loss_mask,segment_ids,positions}, each [B, T], prompts masked, and
    {margins, soft_labels}, [B] float32: 0 and 1 for records that do not say.
    """
    check_shape(name, batch_size=batch_size, length=length, seed=seed)
    pairs = preference_examples(source, tokenizer, length=length, name=name)
    row = partial(_pair_row, pairs, length, tokenizer.pad_id)
    stream = PermutedStream(len(pairs.margins), row, seed)
    return Pipeline(batched(grain.MapDataset.source(stream), batch_size), pairs.chosen.report)


def prompt_batches(
    source: Records,
    tokenizer: Tokenizer,
    *,
    prompts_per_batch: int,
    max_prompt_length: int,
    seed: int,
    name: str = "prompts",
) -> Pipeline:
    """Prompts to sample from: {prompt_tokens [P, L] left-padded, prompt_mask [P, L], prompt_id [P]}.

    `prompt_id` is the record's index in `source`, where its answer is. No prompt occurs twice in a batch:
    each epoch leaves out the `len(source) % P` records at the end of its order.
    """
    check_shape(name, prompts_per_batch=prompts_per_batch, max_prompt_length=max_prompt_length, seed=seed)
    prompts = prompt_tokens(source, tokenizer, max_prompt_length=max_prompt_length, name=name)
    if len(prompts) < prompts_per_batch:
        raise DataError(
            f"{name}: holds {len(prompts)} prompts, "
            f"expected at least prompts_per_batch = {prompts_per_batch}."
        )
    row = partial(_prompt_row, prompts, max_prompt_length, tokenizer.pad_id)
    stream = PromptStream(len(prompts), prompts_per_batch, row, seed)
    return Pipeline(grain.MapDataset.source(stream).to_iter_dataset(_INLINE), {"examples": len(prompts)})


def text_eval_batches(
    source: Records, tokenizer: Tokenizer, *, batch_size: int, length: int, name: str = "text"
) -> Pipeline:
    """One pass of `text_batches` rows in a fixed order; the last batch is filled with rows of segment 0."""
    check_shape(name, batch_size=batch_size, length=length)
    store = text_documents(source, tokenizer, name=name)
    stream = TextStream(store, length, None, tokenizer.pad_id)
    rows = Finite(stream.rows_per_epoch, stream.__getitem__)
    return ordered(rows, batch_size, empty_row(length, tokenizer.pad_id), store.report)


def sft_eval_batches(
    source: Records, tokenizer: Tokenizer, *, batch_size: int, length: int, name: str = "sft"
) -> Pipeline:
    """One pass over the examples in order, one a row; the last batch is filled with rows of segment 0."""
    check_shape(name, batch_size=batch_size, length=length)
    examples = sft_examples(source, tokenizer, length=length, name=name)
    pad = tokenizer.pad_id

    def row(index: int) -> Row:
        return assemble_row([examples.tokens[index]], [examples.loss_masks[index]], length, pad)

    return ordered(Finite(len(examples.tokens), row), batch_size, empty_row(length, pad), examples.report)


def preference_eval_batches(
    source: Records, tokenizer: Tokenizer, *, batch_size: int, length: int, name: str = "preferences"
) -> Pipeline:
    """One pass over the pairs in order; the last batch is filled with rows of segment 0."""
    check_shape(name, batch_size=batch_size, length=length)
    pairs = preference_examples(source, tokenizer, length=length, name=name)
    row = partial(_pair_row, pairs, length, tokenizer.pad_id)
    empty = empty_row(length, tokenizer.pad_id)
    empty_pair = {f"{side}_{key}": value for side in ("chosen", "rejected") for key, value in empty.items()}
    empty_pair |= {"margins": np.zeros((), np.float32), "soft_labels": np.ones((), np.float32)}
    return ordered(Finite(len(pairs.margins), row), batch_size, empty_pair, pairs.chosen.report)


def prompt_eval_batches(
    source: Records,
    tokenizer: Tokenizer,
    *,
    prompts_per_batch: int,
    max_prompt_length: int,
    name: str = "prompts",
) -> Pipeline:
    """One pass over the prompts in order; the last batch is filled with rows of mask 0 and prompt_id -1."""
    check_shape(name, prompts_per_batch=prompts_per_batch, max_prompt_length=max_prompt_length)
    prompts = prompt_tokens(source, tokenizer, max_prompt_length=max_prompt_length, name=name)
    row = partial(_prompt_row, prompts, max_prompt_length, tokenizer.pad_id)
    empty = {
        "prompt_tokens": np.full(max_prompt_length, tokenizer.pad_id, np.int32),
        "prompt_mask": np.zeros(max_prompt_length, np.bool_),
        "prompt_id": np.array(-1, np.int32),
    }
    return ordered(Finite(len(prompts), row), prompts_per_batch, empty, {"examples": len(prompts)})


def _pair_row(pairs: PairExamples, length: int, pad_id: int, index: int) -> Row:
    sides = {"chosen": pairs.chosen, "rejected": pairs.rejected}
    row = {
        f"{side}_{key}": value
        for side, examples in sides.items()
        for key, value in assemble_row(
            [examples.tokens[index]], [examples.loss_masks[index]], length, pad_id
        ).items()
    }
    return {**row, "margins": pairs.margins[index], "soft_labels": pairs.soft_labels[index]}


def _prompt_row(prompts: Sequence[np.ndarray], length: int, pad_id: int, index: int) -> Row:
    tokens = np.full(length, pad_id, np.int32)
    mask = np.zeros(length, np.bool_)
    start = length - len(prompts[index])
    tokens[start:] = prompts[index]
    mask[start:] = True
    return {"prompt_tokens": tokens, "prompt_mask": mask, "prompt_id": np.array(index, np.int32)}


def batched(rows: grain.MapDataset, batch_size: int) -> grain.IterDataset:
    """Batches of rows, drawn where they are asked for."""
    return rows.batch(batch_size).to_iter_dataset(_INLINE)


def ordered(rows: Finite, batch_size: int, empty: Row, report: Report) -> Pipeline:
    """One pass over rows in order; the last batch is filled with `empty` rows."""
    stack: Callable[[Sequence[Row]], Row] = partial(stack_padded, batch_size=batch_size, empty=empty)
    batches = grain.MapDataset.source(rows).batch(batch_size, batch_fn=stack)
    return Pipeline(batches.to_iter_dataset(_INLINE), report)


def check_shape(name: str, *, seed: int = 0, **sizes: int) -> None:
    """Raises DataError for a size below 1 or a negative seed."""
    for key, size in sizes.items():
        if size < 1:
            raise DataError(f"{name}: {key} is {size}, expected at least 1.")
    if seed < 0:
        raise DataError(f"{name}: seed is {seed}, expected at least 0.")
