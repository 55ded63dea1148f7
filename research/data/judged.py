"""Batches of judged solutions, on Grain: pairs, rankings, labelled steps, and completions that are good or bad.

They come as those of `research.data.pipelines` do: with a seed they never end and resume bit for bit; without one they
are one ordered pass whose last batch is filled with rows of segment 0.

Legend: B rows, T row length, P prompts, K candidates.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Literal, NamedTuple

import grain
import numpy as np

from research.data.examples import (
    JudgedExamples,
    Labels,
    judged_examples,
    preference_examples,
    ranked_examples,
    step_examples,
)
from research.data.packing import Row, assemble_row, empty_row
from research.data.pipelines import Pipeline, batched, check_shape, ordered
from research.data.records import Records
from research.data.report import DataReport, Limits
from research.data.streams import Finite, MismatchedStream, PermutedStream, stack_padded
from research.data.tokenizer import Tokenizer

JudgedKind = Literal["preferences", "unpaired", "rankings", "steps"]


class Options(NamedTuple):
    """What the kinds need to know besides their records.

    Attributes:
        length: tokens of a row.
        name: what messages call the source.
        limits: what happens to longer rows.
        candidates: K of rankings.
        labels: of steps: "steps" (a process reward model), or "outcome", which keeps the last label alone.
    """

    length: int
    name: str
    limits: Limits
    candidates: int = 2
    labels: Labels = "steps"


class _Items(NamedTuple):
    """Items of one kind as rows.

    Attributes:
        size: how many there are.
        row: of an item.
        empty: the row that fills a last batch.
        report: what was left out.
        groups: items of one group are not mixed; None where none are mixed. Then `row` takes two items.
    """

    size: int
    row: Callable[..., Row]
    empty: Row
    report: DataReport
    groups: np.ndarray | None = None


def judged_batches(
    kind: JudgedKind,
    source: Records,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    seed: int | None,
    name: str,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    candidates: int = 2,
    labels: Labels = "steps",
) -> Pipeline:
    """Endless training batches in a new order each epoch or, where `seed` is None, one pass in order.

    By kind, each row {tokens, loss_mask, segment_ids, positions}:
        preferences  the prefixes `chosen_` and `rejected_`, [B, T], prompts masked; margins, soft_labels [B] float32,
                     0 and 1 for records that do not say.
        unpaired     [B, T], and with the prefix `kl_` this row's prompt and another prompt's completion: that of the
                     next row, or of the first after it that answers another prompt; desirable [B] bool. A preference
                     pair gives two rows, which are drawn apart. Source: Ethayarajh et al. 2024, Section 4.1 (the KL
                     is estimated on mismatched outputs of the batch).
        rankings     [P, K, T] with P = batch_size; ranks [P, K] int32, 0 the best. Shorter rankings are filled up
                     with rows of segment 0 and rank K. A preference pair is a ranking of two.
        steps        [B, T], with loss_mask at the last token of each labelled step (`steps.step_end_mask`);
                     step_labels [B, T] float32, the probability that the step is right, 0 elsewhere.
    """
    check_shape(name, batch_size=batch_size, candidates=candidates, length=length, seed=seed or 0)
    items = _KINDS[kind](source, tokenizer, Options(length, name, limits, candidates, labels))
    if items.groups is not None:
        stream = MismatchedStream(items.groups, items.row, seed)
        if seed is not None:
            return Pipeline(batched(grain.MapDataset.source(stream), batch_size), items.report)
        return ordered(Finite(items.size, stream.__getitem__), batch_size, items.empty, items.report)
    if seed is not None:
        permuted = PermutedStream(items.size, items.row, seed)
        return Pipeline(batched(grain.MapDataset.source(permuted), batch_size), items.report)
    return ordered(Finite(items.size, items.row), batch_size, items.empty, items.report)


def _pairs(source: Records, tokenizer: Tokenizer, how: Options) -> _Items:
    pairs = preference_examples(source, tokenizer, length=how.length, name=how.name, limits=how.limits)
    sides = {"chosen_": pairs.chosen, "rejected_": pairs.rejected}

    def row(index: int) -> Row:
        made: Row = {"margins": pairs.margins[index], "soft_labels": pairs.soft_labels[index]}
        for side, examples in sides.items():
            part = ([examples.tokens[index]], [examples.loss_masks[index]])
            made |= _prefixed(side, assemble_row(*part, how.length, tokenizer.pad_id))
        return made

    blank = empty_row(how.length, tokenizer.pad_id)
    empty: Row = {"margins": np.zeros((), np.float32), "soft_labels": np.ones((), np.float32)}
    for side in sides:
        empty |= _prefixed(side, blank)
    return _Items(len(pairs.margins), row, empty, pairs.report)


def _unpaired(source: Records, tokenizer: Tokenizer, how: Options) -> _Items:
    examples = judged_examples(source, tokenizer, length=how.length, name=how.name, limits=how.limits)
    blank = empty_row(how.length, tokenizer.pad_id)
    empty = {**blank, **_prefixed("kl_", blank), "desirable": np.zeros((), np.bool_)}
    row = partial(_unpaired_row, examples, how.length, tokenizer.pad_id)
    return _Items(len(examples.desirable), row, empty, examples.report, examples.prompt_ids)


def _unpaired_row(examples: JudgedExamples, length: int, pad_id: int, index: int, other: int) -> Row:
    (prompt, _), (_, completion) = examples.parts(index), examples.parts(other)
    mixed = np.concatenate([prompt, completion])[:length]
    row = assemble_row([examples.rows.tokens[index]], [examples.rows.loss_masks[index]], length, pad_id)
    kl_row = assemble_row([mixed], [np.arange(len(mixed)) >= len(prompt)], length, pad_id)
    return {**row, **_prefixed("kl_", kl_row), "desirable": examples.desirable[index]}


def _rankings(source: Records, tokenizer: Tokenizer, how: Options) -> _Items:
    K, pad_id = how.candidates, tokenizer.pad_id
    examples = ranked_examples(
        source, tokenizer, length=how.length, name=how.name, limits=how.limits, candidates=K
    )
    blank = empty_row(how.length, pad_id)

    def row(index: int) -> Row:
        rows = [assemble_row([part], [mask], how.length, pad_id) for part, mask in examples.candidates[index]]
        ranks = np.full(K, K, np.int32)
        ranks[: len(rows)] = examples.ranks[index]
        return {**stack_padded(rows, batch_size=K, empty=blank), "ranks": ranks}

    empty = {**stack_padded([], batch_size=K, empty=blank), "ranks": np.full(K, K, np.int32)}
    return _Items(len(examples.ranks), row, empty, examples.report)


def _steps(source: Records, tokenizer: Tokenizer, how: Options) -> _Items:
    examples = step_examples(
        source, tokenizer, length=how.length, name=how.name, limits=how.limits, labels=how.labels
    )
    rows = examples.rows

    def row(index: int) -> Row:
        made = assemble_row([rows.tokens[index]], [rows.loss_masks[index]], how.length, tokenizer.pad_id)
        labels = np.zeros(how.length, np.float32)
        labels[: len(examples.labels[index])] = examples.labels[index]
        return {**made, "step_labels": labels}

    empty = {**empty_row(how.length, tokenizer.pad_id), "step_labels": np.zeros(how.length, np.float32)}
    return _Items(len(examples.labels), row, empty, examples.report)


_KINDS: Mapping[JudgedKind, Callable[[Records, Tokenizer, Options], _Items]] = MappingProxyType(
    {"preferences": _pairs, "unpaired": _unpaired, "rankings": _rankings, "steps": _steps}
)


def _prefixed(prefix: str, row: Row) -> Row:
    return {f"{prefix}{key}": value for key, value in row.items()}
