"""Batches for training and evaluation, on Grain.

With a seed, pipelines never end and draw a new order each epoch. A batch is a pure function of (records, seed,
batch number), so an iterator's state is one small JSON-serialisable dict and a restored iterator continues
bit for bit. Without one (None) they are one pass in order, whose last batch is filled with rows of segment 0:

    batches = iter(sft_batches(source, tokenizer, batch_size=32, length=256, seed=0, packing=True))
    state = batches.get_state();  ...;  batches.set_state(state)

Legend: B rows, T row length, P prompts, L prompt length. Rows are those of `research.data.packing`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import grain

from research.core.errors import DataError
from research.data.examples import prompt_examples, sft_examples, text_documents
from research.data.packing import Row, empty_row
from research.data.records import Records
from research.data.report import DataReport, Limits
from research.data.streams import bucket_batches, packed_rows, padded, prompt_groups, stack, text_rows
from research.data.tokenizer import Tokenizer

_INLINE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # a batch costs less than a thread hop


@dataclass(frozen=True)
class Pipeline:
    """Batches, and what became of the records that they are made of."""

    dataset: grain.IterDataset
    report: DataReport

    def __iter__(self) -> grain.DatasetIterator:
        """A fresh iterator with `get_state()` and `set_state(state)`."""
        return iter(self.dataset)


def text_batches(
    sources: Sequence[Records],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    seed: int | None,
    weights: Sequence[float] = (1.0,),
    name: str = "text",
) -> Pipeline:
    """Pretraining batches {tokens, loss_mask, segment_ids, positions}, each [B, T], of {text} records.

    Each row is from one source, in proportion to `weights`. Documents are cut, concatenated and split into full rows
    (`packing.concat_then_split`), from a new phase each epoch; one pass takes one source.
    """
    names = [name] if len(sources) == 1 else [f"{name}[{index}]" for index in range(len(sources))]
    stores = [text_documents(part, tokenizer, name=each) for part, each in zip(sources, names, strict=True)]
    streams = [
        text_rows(store, length, None if seed is None else (seed, index), tokenizer.pad_id)
        for index, store in enumerate(stores)
    ]
    count = sum(store.report.records for store in stores)
    report = DataReport(name, count, count, sizes={"tokens": sum(store.report.sizes["tokens"] for store in stores)})
    if seed is None:
        (rows,) = streams
        return ordered(rows.per_epoch, rows.__getitem__, batch_size, empty_row(length, tokenizer.pad_id), report)
    mixed = [grain.MapDataset.source(stream) for stream in streams]
    whole = mixed[0] if len(mixed) == 1 else grain.MapDataset.mix(mixed, list(weights))
    return Pipeline(batched(whole, batch_size), report)


def sft_batches(
    source: Records,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    seed: int | None,
    packing: bool = False,
    bucket_lengths: Sequence[int] = (),
    name: str = "sft",
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> Pipeline:
    """Batches {tokens, loss_mask, segment_ids, positions}, each [B, T], with loss on responses only.

    With `packing`, T = `length` and whole examples share rows. Without it, one example a row, and examples of
    like length share a batch whose T is one of `bucket_lengths` (default: a quarter, half and all of
    `length`), so there are that many shapes to compile. One pass has one example a row and T = `length`.
    """
    examples, pad = sft_examples(source, tokenizer, length=length, name=name, limits=limits), tokenizer.pad_id
    if seed is None:

        def row(index: int) -> Row:
            return padded(examples.rows[index], length, pad)

        return ordered(len(examples.rows), row, batch_size, empty_row(length, pad), examples.report)
    if packing:
        packed = grain.MapDataset.source(packed_rows(examples, length, seed, pad))
        return Pipeline(batched(packed, batch_size), examples.report)
    buckets = sorted({length, *(bucket_lengths or (max(1, length // 4), max(1, length // 2)))})
    batches = grain.MapDataset.source(bucket_batches(examples, batch_size, buckets, seed, pad))
    return Pipeline(batches.to_iter_dataset(_INLINE), examples.report)


def prompt_batches(
    source: Records,
    tokenizer: Tokenizer,
    *,
    prompts_per_batch: int,
    max_prompt_length: int,
    seed: int | None,
    name: str = "prompts",
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> Pipeline:
    """Prompts to sample from: {prompt_tokens [P, L] left-padded, prompt_mask [P, L], prompt_id [P]}.

    `prompt_id` is the record's index in `source`, where its answer is. No prompt occurs twice in a batch: each epoch
    leaves out the `len(source) % P` records at the end of its order. One pass leaves out none; its last batch is
    filled with rows of mask 0 and prompt_id -1.
    """
    prompts = prompt_examples(source, tokenizer, length=max_prompt_length, name=name, limits=limits)
    count = len(prompts.tokens)
    row = partial(prompts.row, length=max_prompt_length, pad_id=tokenizer.pad_id)
    if seed is None:
        return ordered(count, row, prompts_per_batch, row(None), prompts.report)
    if count < prompts_per_batch:
        raise DataError(f"{name}: holds {count} prompts, expected at least prompts_per_batch = {prompts_per_batch}.")
    batches = prompt_groups(count, prompts_per_batch, row, seed)
    return Pipeline(grain.MapDataset.source(batches).to_iter_dataset(_INLINE), prompts.report)


def batched(rows: grain.MapDataset, batch_size: int) -> grain.IterDataset:
    """Batches of rows, drawn where they are asked for."""
    return rows.batch(batch_size).to_iter_dataset(_INLINE)


def ordered(count: int, row: Callable[[int], Row], batch_size: int, empty: Row, report: DataReport) -> Pipeline:
    """One pass over `count` rows in order; the last batch is filled with `empty` rows."""

    def filled(rows: Sequence[Row]) -> Row:
        return stack([*rows, *[empty] * (batch_size - len(rows))])

    batches = grain.MapDataset.range(count).map(row).batch(batch_size, batch_fn=filled)
    return Pipeline(batches.to_iter_dataset(_INLINE), report)
