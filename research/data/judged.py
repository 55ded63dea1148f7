"""Batches of judged solutions, on Grain: pairs, rankings, labelled steps, and completions that are good or bad.

They come as those of `research.data.pipelines` do, with a seed and without.

Legend: B rows, T row length, P prompts, K candidates.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import grain
import numpy as np

from research.core.errors import DataError
from research.data.chat import Message, Rendered, render_messages
from research.data.packing import Row
from research.data.pipelines import Pipeline, batched, ordered
from research.data.preferences import parse_judged, parse_preference, parse_ranking
from research.data.records import Records
from research.data.report import DataReport, Fitter, Limits
from research.data.steps import parse_steps, step_end_mask
from research.data.streams import mismatched_rows, padded, permuted_rows, stack
from research.data.tokenizer import Tokenizer

JudgedKind = Literal["preferences", "unpaired", "rankings", "steps"]
_EQUAL = "answers equal once cut"
_NOTHING = Rendered(np.zeros(0, np.int32), np.zeros(0, np.bool_), 0)


class _Items(NamedTuple):
    """Items of one kind, and how they become rows.

    Attributes:
        kept: those that fit.
        row: of an item; where there are groups, of an item and another one.
        blank: the item whose row fills a last batch.
        report: what was left out.
        groups: items of one group are not mixed; None where none are mixed.
    """

    kept: Sequence[Any]
    row: Callable[..., Row]
    blank: Any
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
    items = _KINDS[kind](Fitter(source, name, length, limits), tokenizer, candidates)
    kept, count = items.kept, len(items.kept)
    if items.groups is None:
        stream = permuted_rows(count, lambda index: items.row(kept[index]), seed)
        empty = items.row(items.blank)
    else:
        stream = mismatched_rows(items.groups, lambda index, other: items.row(kept[index], kept[other]), seed)
        empty = items.row(items.blank, items.blank)
    if seed is None:
        return ordered(count, stream.__getitem__, batch_size, empty, items.report)
    return Pipeline(batched(grain.MapDataset.source(stream), batch_size), items.report)


def _pairs(fit: Fitter, tokenizer: Tokenizer, _: int) -> _Items:
    kept = []
    for index, record in enumerate(fit.source):
        pair = parse_preference(record, where=fit.where(index))
        rows = _answers(fit, index, pair.prompt, (pair.chosen, pair.rejected), tokenizer)
        if rows and np.array_equal(rows[0].tokens, rows[1].tokens):
            fit.drop(index, _EQUAL)
        elif rows:
            kept.append((*rows, pair.margin, pair.label_probability))

    def row(item: tuple[Rendered, Rendered, float, float]) -> Row:
        chosen, rejected = (padded(each, fit.length, tokenizer.pad_id) for each in item[:2])
        numbers = {"margins": np.asarray(item[2], np.float32), "soft_labels": np.asarray(item[3], np.float32)}
        return {**numbers, **_prefixed("chosen_", chosen), **_prefixed("rejected_", rejected)}

    return _Items(kept, row, (_NOTHING, _NOTHING, 0.0, 1.0), fit.report())


def _unpaired(fit: Fitter, tokenizer: Tokenizer, _: int) -> _Items:
    """Items of one group answer one prompt.

    Raises:
        DataError: fewer than two prompts are left, so that no completion can be put under another's prompt.
    """
    kept, groups, known = list[tuple[Rendered, bool]](), [], dict[bytes, int]()
    for index, record in enumerate(fit.source):
        judged = parse_judged(record, where=fit.where(index))
        fitting = [(_answers(fit, index, each.prompt, (each.completion,), tokenizer), each) for each in judged]
        items = [(row, each.desirable) for rows, each in fitting for row in rows]
        if len(items) == 2 and np.array_equal(items[0][0].tokens, items[1][0].tokens):  # one text, good and bad
            for _item in items:
                fit.drop(index, _EQUAL)
            continue
        for row, desirable in items:
            kept.append((row, desirable))
            groups.append(known.setdefault(row.tokens[: row.prompt_length].tobytes(), len(known)))
    report = fit.report(desirable=sum(desirable for _, desirable in kept))
    if len(known) < 2:
        raise DataError(
            f"{fit.name}: its {len(fit.source)} records hold completions of {len(known)} prompts, expected at least 2 "
            "because the KL is measured on completions of other prompts."
        )

    def mixed(item: tuple[Rendered, bool], other: tuple[Rendered, bool]) -> Row:
        (own, desirable), (another, _) = item, other
        prompt, completion = own.tokens[: own.prompt_length], another.tokens[another.prompt_length :]
        tokens = np.concatenate([prompt, completion])[: fit.length]
        kl = Rendered(tokens, np.arange(len(tokens)) >= len(prompt), len(prompt))
        own_row, kl_row = (padded(each, fit.length, tokenizer.pad_id) for each in (own, kl))
        return {**own_row, **_prefixed("kl_", kl_row), "desirable": np.asarray(desirable, np.bool_)}

    return _Items(kept, mixed, (_NOTHING, False), report, np.asarray(groups, np.int64))


def _rankings(fit: Fitter, tokenizer: Tokenizer, K: int) -> _Items:
    kept = []
    for index, record in enumerate(fit.source):
        ranking = parse_ranking(record, where=fit.where(index))
        if len(ranking.completions) > K:
            raise DataError(
                f"{fit.where(index)}: holds {len(ranking.completions)} completions, expected at most candidates = {K}."
            )
        rows = _answers(fit, index, ranking.prompt, ranking.completions, tokenizer)
        rank_of: dict[bytes, int] = {}
        pairs = zip(rows, ranking.ranks, strict=False)
        if not all(rank_of.setdefault(each.tokens.tobytes(), rank) == rank for each, rank in pairs):
            fit.drop(index, _EQUAL)
        elif rows:
            kept.append((rows, ranking.ranks))

    def row(item: tuple[Sequence[Rendered], Sequence[int]]) -> Row:
        rows, known = item
        made = [padded(each, fit.length, tokenizer.pad_id) for each in (*rows, *[_NOTHING] * (K - len(rows)))]
        ranks = np.array([*known, *[K] * (K - len(known))], np.int32)
        return {**stack(made), "ranks": ranks}

    return _Items(kept, row, ((), ()), fit.report())


def _steps(fit: Fitter, tokenizer: Tokenizer, _: int) -> _Items:
    """Steps that end beyond a cut go; a solution left without a label is left out."""
    kept = []
    for index, record in enumerate(fit.source):
        where = fit.where(index)
        parsed = parse_steps(record, where=where)
        turns = (*parsed.prompt, Message("assistant", parsed.solution))
        whole = render_messages(turns, tokenizer, where=where, train_on="last")
        ends = np.flatnonzero(step_end_mask(whole.tokens, tokenizer, whole.loss_mask))
        if len(ends) != len(parsed.labels):
            raise DataError(
                f"{where}: its tokens hold {len(ends)} steps for {len(parsed.labels)} labels, expected one "
                "label a line of text."
            )
        for fitting in fit.rows(index, turns, [whole]):
            mask, values = np.zeros(len(fitting.tokens), np.bool_), np.zeros(fit.length, np.float32)
            for end, label in zip(ends, parsed.labels, strict=True):
                if label is not None and end < len(mask):
                    mask[end], values[end] = True, label
            if mask.any():
                kept.append((Rendered(fitting.tokens, mask, whole.prompt_length), values))
            else:
                fit.drop(index, "no label left")

    def row(item: tuple[Rendered, np.ndarray]) -> Row:
        return {**padded(item[0], fit.length, tokenizer.pad_id), "step_labels": item[1]}

    labelled = sum(int(solution.loss_mask.sum()) for solution, _ in kept)
    return _Items(kept, row, (_NOTHING, np.zeros(fit.length, np.float32)), fit.report(labels=labelled))


_KINDS: Mapping[JudgedKind, Callable[[Fitter, Tokenizer, int], _Items]] = MappingProxyType(
    {"preferences": _pairs, "unpaired": _unpaired, "rankings": _rankings, "steps": _steps}
)


def _answers(
    fit: Fitter, index: int, prompt: tuple[Message, ...], answers: Sequence[Message], tokenizer: Tokenizer
) -> list[Rendered]:
    """Several answers to one prompt as rows that fit, with loss on the answers; none where they are left out."""
    where = fit.where(index)
    rendered = [render_messages((*prompt, answer), tokenizer, where=where, train_on="last") for answer in answers]
    return fit.rows(index, (*prompt, *answers), rendered)


def _prefixed(prefix: str, row: Row) -> Row:
    return {f"{prefix}{key}": value for key, value in row.items()}
