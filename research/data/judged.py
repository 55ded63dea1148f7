"""Batches of judged solutions, on Grain: pairs, rankings, labelled steps, and completions that are good or bad.

They come as those of `research.data.pipelines` do, with a seed and without.

Legend: B rows, T row length, P prompts, K candidates.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple, cast, get_args

import grain
import numpy as np

from research.core.errors import DataError
from research.data.chat import Message, Rendered, render_messages
from research.data.examples import prompt_examples, sft_examples
from research.data.packing import Row, assemble_row, empty_row
from research.data.pipelines import Pipeline, batched, check_shape, ordered
from research.data.preferences import parse_judged, parse_preference, parse_ranking
from research.data.records import Records
from research.data.report import DataReport, Fitter, Limits
from research.data.steps import parse_steps, step_end_mask
from research.data.streams import Finite, MismatchedStream, PermutedStream, stack_padded
from research.data.tokenizer import Tokenizer

JudgedKind = Literal["preferences", "unpaired", "rankings", "steps"]
Labels = Literal["steps", "outcome"]
_EQUAL = "answers equal once cut"


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

    def fitter(self, source: Records) -> Fitter:
        """Applies the limits to a source."""
        return Fitter(source, self.name, self.length, self.limits)

    def row(self, rendered: Rendered, tokenizer: Tokenizer) -> Row:
        """One example, padded to `length`."""
        return assemble_row([rendered.tokens], [rendered.loss_mask], self.length, tokenizer.pad_id)


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
    if labels not in get_args(Labels):
        raise DataError(f"{name}: labels: got {labels!r}, expected one of steps, outcome.")
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
    fit, kept = how.fitter(source), []
    for index, record in enumerate(source):
        pair = parse_preference(record, where=fit.where(index))
        rows = _answers(fit, index, pair.prompt, (pair.chosen, pair.rejected), tokenizer)
        if rows is None:
            continue
        if np.array_equal(rows[0].tokens, rows[1].tokens):
            fit.drop(index, _EQUAL)
        else:
            kept.append((rows, np.float32(pair.margin), np.float32(pair.label_probability)))

    def row(index: int) -> Row:
        rows, margin, probability = kept[index]
        chosen, rejected = (how.row(each, tokenizer) for each in rows)
        made: Row = {"margins": np.asarray(margin), "soft_labels": np.asarray(probability)}
        return {**made, **_prefixed("chosen_", chosen), **_prefixed("rejected_", rejected)}

    blank = empty_row(how.length, tokenizer.pad_id)
    empty: Row = {"margins": np.zeros((), np.float32), "soft_labels": np.ones((), np.float32)}
    empty = {**empty, **_prefixed("chosen_", blank), **_prefixed("rejected_", blank)}
    return _Items(len(kept), row, empty, fit.report())


def _unpaired(source: Records, tokenizer: Tokenizer, how: Options) -> _Items:
    """Items of one group answer one prompt.

    Raises:
        DataError: fewer than two prompts are left, so that no completion can be put under another's prompt.
    """
    fit, kept, groups = how.fitter(source), list[tuple[Rendered, bool]](), []
    known: dict[bytes, int] = {}
    for index, record in enumerate(source):
        judged = parse_judged(record, where=fit.where(index))
        fitting = [_answers(fit, index, each.prompt, (each.completion,), tokenizer) for each in judged]
        cut = [rows[0].tokens for rows in fitting if rows is not None]
        contradictory = len(cut) == 2 and np.array_equal(cut[0], cut[1])
        for each, rows in zip(judged, fitting, strict=True):
            if rows is None:
                continue
            if contradictory:
                fit.drop(index, _EQUAL)
                continue
            kept.append((rows[0], each.desirable))
            prompt = rows[0].tokens[: rows[0].prompt_length].tobytes()
            groups.append(known.setdefault(prompt, len(known)))
    report = fit.report(desirable=sum(desirable for _, desirable in kept))
    if len(known) < 2:
        raise DataError(
            f"{how.name}: its {len(source)} records hold completions of {len(known)} prompts, expected at least 2 "
            "because the KL is measured on completions of other prompts."
        )

    def row(index: int, other: int) -> Row:
        (own, desirable), (another, _) = kept[index], kept[other]
        prompt, completion = own.tokens[: own.prompt_length], another.tokens[another.prompt_length :]
        mixed = np.concatenate([prompt, completion])[: how.length]
        kl = Rendered(mixed, np.arange(len(mixed)) >= len(prompt), len(prompt))
        made = {**how.row(own, tokenizer), **_prefixed("kl_", how.row(kl, tokenizer))}
        return {**made, "desirable": np.asarray(desirable, np.bool_)}

    blank = empty_row(how.length, tokenizer.pad_id)
    empty = {**blank, **_prefixed("kl_", blank), "desirable": np.zeros((), np.bool_)}
    return _Items(len(kept), row, empty, report, np.asarray(groups, np.int64))


def _rankings(source: Records, tokenizer: Tokenizer, how: Options) -> _Items:
    K = how.candidates
    fit, kept = how.fitter(source), []
    for index, record in enumerate(source):
        ranking = parse_ranking(record, where=fit.where(index))
        if len(ranking.completions) > K:
            raise DataError(
                f"{fit.where(index)}: holds {len(ranking.completions)} completions, expected at most candidates = {K}."
            )
        rows = _answers(fit, index, ranking.prompt, ranking.completions, tokenizer)
        if rows is None:
            continue
        rank_of: dict[bytes, int] = {}
        pairs = zip(rows, ranking.ranks, strict=True)
        if all(rank_of.setdefault(each.tokens.tobytes(), rank) == rank for each, rank in pairs):
            kept.append((rows, ranking.ranks))
        else:
            fit.drop(index, _EQUAL)
    blank = empty_row(how.length, tokenizer.pad_id)

    def row(index: int) -> Row:
        rows, known = kept[index]
        ranks = np.full(K, K, np.int32)
        ranks[: len(rows)] = known
        made = [how.row(each, tokenizer) for each in rows]
        return {**stack_padded(made, batch_size=K, empty=blank), "ranks": ranks}

    empty = {**stack_padded([], batch_size=K, empty=blank), "ranks": np.full(K, K, np.int32)}
    return _Items(len(kept), row, empty, fit.report())


def _steps(source: Records, tokenizer: Tokenizer, how: Options) -> _Items:
    """Steps that end beyond a cut go; a solution left without a label is left out."""
    fit, kept = how.fitter(source), []
    for index, record in enumerate(source):
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
        rows = fit.rows(index, turns, [whole])
        if rows is None:
            continue
        pairs = [(end, label) for end, label in zip(ends, parsed.labels, strict=True) if label is not None]
        if how.labels == "outcome":
            pairs = [(ends[-1], pairs[-1][1])]
        size = len(rows[0].tokens)
        mask, values = np.zeros(size, np.bool_), np.zeros(how.length, np.float32)
        for end, label in pairs:
            if end < size:
                mask[end], values[end] = True, label
        if mask.any():
            kept.append((Rendered(rows[0].tokens, mask, whole.prompt_length), values))
        else:
            fit.drop(index, "no label left")

    def row(index: int) -> Row:
        solution, labels = kept[index]
        return {**how.row(solution, tokenizer), "step_labels": labels}

    empty = {**empty_row(how.length, tokenizer.pad_id), "step_labels": np.zeros(how.length, np.float32)}
    labelled = sum(int(solution.loss_mask.sum()) for solution, _ in kept)
    return _Items(len(kept), row, empty, fit.report(labels=labelled))


_KINDS: Mapping[JudgedKind, Callable[[Records, Tokenizer, Options], _Items]] = MappingProxyType(
    {"preferences": _pairs, "unpaired": _unpaired, "rankings": _rankings, "steps": _steps}
)


def check_lengths(
    kind: str, source: Records, tokenizer: Tokenizer, *, length: int, name: str, limits: Limits, candidates: int = 2
) -> DataReport:
    """What becomes of a source's records under these limits, before anything is trained.

    Args:
        kind: chat, preferences, unpaired, rankings, steps, or prompts (of rollouts and evaluations).
        source: all records that will be read.
        tokenizer: measures them.
        length: tokens of a row; of a prompt, where `kind` is prompts.
        name: what messages call the source, such as "rl" or "evaluation".
        limits: what happens to records that do not fit.
        candidates: most completions of a ranking.

    Raises:
        DataError: names file and record of the first that does not fit, or says how many would be dropped.
    """
    if kind in ("chat", "prompts"):
        read = sft_examples if kind == "chat" else prompt_examples
        return read(source, tokenizer, length=length, name=name, limits=limits).report
    return _KINDS[cast(JudgedKind, kind)](source, tokenizer, Options(length, name, limits, candidates)).report


def _answers(
    fit: Fitter, index: int, prompt: tuple[Message, ...], answers: Sequence[Message], tokenizer: Tokenizer
) -> list[Rendered] | None:
    """Several answers to one prompt as rows that fit, with loss on the answers; None where they are left out."""
    where = fit.where(index)
    rendered = [render_messages((*prompt, answer), tokenizer, where=where, train_on="last") for answer in answers]
    return fit.rows(index, (*prompt, *answers), rendered)


def _prefixed(prefix: str, row: Row) -> Row:
    return {f"{prefix}{key}": value for key, value in row.items()}
