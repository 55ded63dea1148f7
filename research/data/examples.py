"""Records as tokens, once and in memory: what the pipelines draw from.

A set of N examples costs about five bytes a token. All of it is tokenised before the first batch, so a bad record
stops a run at its start, and what does not fit is known (`DataReport`) before anything is trained.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from research.core.errors import DataError
from research.data.chat import (
    Message,
    Rendered,
    normalize_record,
    prompt_messages,
    render_messages,
    render_prompt,
)
from research.data.preferences import parse_judged, parse_preference, parse_ranking
from research.data.records import Records
from research.data.report import DataReport, Fitter, Limits
from research.data.steps import parse_steps, step_end_mask
from research.data.tokenizer import Tokenizer

Labels = Literal["steps", "outcome"]


@dataclass(frozen=True)
class Documents:
    """Documents end to end: `tokens` [sum(lengths)] int32, each BOS ... EOS, and `lengths` [N]."""

    tokens: np.ndarray
    lengths: np.ndarray
    report: DataReport


@dataclass(frozen=True)
class Examples:
    """N tokenised examples, each with its loss mask and the index of its record."""

    tokens: Sequence[np.ndarray]
    loss_masks: Sequence[np.ndarray]
    record_ids: np.ndarray
    report: DataReport

    @property
    def lengths(self) -> np.ndarray:
        """[N] tokens of each example."""
        return np.array([len(tokens) for tokens in self.tokens], np.int64)


@dataclass(frozen=True)
class PairExamples:
    """N pairs: two sides of N examples each, and `margins` and `soft_labels` [N] float32."""

    chosen: Examples
    rejected: Examples
    margins: np.ndarray
    soft_labels: np.ndarray

    @property
    def report(self) -> DataReport:
        """Counts of pairs."""
        return self.chosen.report


@dataclass(frozen=True)
class StepExamples:
    """N solutions: `rows` with loss masks that are True at the last token of each labelled step, and `labels`,
    float32 of the rows' lengths, 0 elsewhere.
    """

    rows: Examples
    labels: Sequence[np.ndarray]

    @property
    def report(self) -> DataReport:
        """Counts of solutions."""
        return self.rows.report


@dataclass(frozen=True)
class JudgedExamples:
    """N completions: `rows`, `desirable` [N] bool, and `prompt_ids` [N], equal where prompts are."""

    rows: Examples
    desirable: np.ndarray
    prompt_ids: np.ndarray

    @property
    def report(self) -> DataReport:
        """Counts of completions: a pair has two."""
        return self.rows.report

    def parts(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(prompt, completion) tokens; the completion is what the loss mask covers, to the row's end."""
        start = int(self.rows.loss_masks[index].argmax())
        return self.rows.tokens[index][:start], self.rows.tokens[index][start:]


@dataclass(frozen=True)
class RankedExamples:
    """N rankings: `candidates[n]` are its completions as (tokens, loss mask), `ranks[n]` theirs from 0, best."""

    candidates: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]]
    ranks: Sequence[np.ndarray]
    report: DataReport


@dataclass(frozen=True)
class PromptExamples:
    """N prompts ready for generation, and the index of each one's record."""

    tokens: Sequence[np.ndarray]
    record_ids: np.ndarray
    report: DataReport


def text_documents(source: Records, tokenizer: Tokenizer, *, name: str) -> Documents:
    """Tokenises {text} records as BOS text EOS; DataError if there is nothing to predict."""
    parts = []
    for index, record in enumerate(source):
        if not isinstance(record.get("text"), str):
            raise DataError(f"{name}: record {index}: found the keys {', '.join(record)}, expected text.")
        ids = [tokenizer.bos_id, *tokenizer.encode(record["text"]), tokenizer.eos_id]
        parts.append(np.asarray(ids, np.int32))
    if not parts:
        raise DataError(f"{name}: holds no documents, expected at least one.")
    lengths = np.array([len(part) for part in parts], np.int64)
    report = DataReport(name, len(parts), len(parts), sizes={"tokens": int(lengths.sum())})
    return Documents(np.concatenate(parts), lengths, report)


def sft_examples(
    source: Records, tokenizer: Tokenizer, *, length: int, name: str, limits: Limits
) -> Examples:
    """Tokenises conversations, whose assistant turns carry loss."""
    fit = Fitter(source, name, length, limits)
    kept: list[tuple[int, Rendered]] = []
    for index, record in enumerate(source):
        messages = normalize_record(record, where=fit.where(index))
        rendered = render_messages(messages, tokenizer, where=fit.where(index))
        rows = fit.rows(index, messages, [rendered])
        kept += [(index, row) for row in rows or ()]
    tokens = sum(len(example.tokens) for _, example in kept)
    targets = sum(int(example.loss_mask.sum()) for _, example in kept)
    return _examples(kept, fit.report(tokens=tokens, target_tokens=targets))


def preference_examples(
    source: Records, tokenizer: Tokenizer, *, length: int, name: str, limits: Limits
) -> PairExamples:
    """Tokenises pairs; one whose sides are equal once they are cut is left out."""
    fit = Fitter(source, name, length, limits)
    kept: list[tuple[int, Rendered, Rendered]] = []
    margins, soft_labels = [], []
    for index, record in enumerate(source):
        pair = parse_preference(record, where=fit.where(index))
        rows = _answers(fit, index, pair.prompt, (pair.chosen, pair.rejected), tokenizer)
        if rows is None:
            continue
        chosen, rejected = rows
        if np.array_equal(chosen.tokens, rejected.tokens):
            fit.drop(index, _EQUAL)
            continue
        kept.append((index, chosen, rejected))
        margins.append(pair.margin)
        soft_labels.append(pair.label_probability)
    report = fit.report()
    return PairExamples(
        _examples([(index, chosen) for index, chosen, _ in kept], report),
        _examples([(index, rejected) for index, _, rejected in kept], report),
        np.asarray(margins, np.float32),
        np.asarray(soft_labels, np.float32),
    )


def step_examples(
    source: Records, tokenizer: Tokenizer, *, length: int, name: str, limits: Limits, labels: Labels = "steps"
) -> StepExamples:
    """Tokenises solutions with labelled steps; steps that end beyond a cut go.

    Args:
        source: records that `steps.parse_steps` reads.
        tokenizer: gives ids, and says where steps end.
        length: most tokens of a row.
        name: what an error message calls the source.
        limits: what happens to longer rows; one left without a label is left out.
        labels: "steps" (a process reward model), or "outcome": only the last label, at the solution's end.
    """
    if labels not in ("steps", "outcome"):
        raise DataError(f"{name}: labels: got {labels!r}, expected one of steps, outcome.")
    fit = Fitter(source, name, length, limits)
    kept: list[tuple[int, Rendered]] = []
    kept_labels: list[np.ndarray] = []
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
        if labels == "outcome":
            pairs = [(ends[-1], pairs[-1][1])]
        mask = np.zeros(len(whole.tokens), np.bool_)
        values = np.zeros(len(whole.tokens), np.float32)
        for end, label in pairs:
            mask[end], values[end] = True, label
        size = len(rows[0].tokens)
        if not mask[:size].any():
            fit.drop(index, "no label left")
            continue
        kept.append((index, Rendered(rows[0].tokens, mask[:size], whole.prompt_length)))
        kept_labels.append(values[:size])
    count = sum(int(example.loss_mask.sum()) for _, example in kept)
    return StepExamples(_examples(kept, fit.report(labels=count)), kept_labels)


def judged_examples(
    source: Records, tokenizer: Tokenizer, *, length: int, name: str, limits: Limits
) -> JudgedExamples:
    """Tokenises judged completions (a preference pair gives two); pairs that are equal once cut are left out.

    Raises:
        DataError: fewer than two prompts are left, so that no completion can be put under another's prompt.
    """
    fit = Fitter(source, name, length, limits)
    kept: list[tuple[int, Rendered]] = []
    desirable, prompt_ids = [], []
    known: dict[bytes, int] = {}
    for index, record in enumerate(source):
        judged = parse_judged(record, where=fit.where(index))
        rows = [_answers(fit, index, each.prompt, (each.completion,), tokenizer) for each in judged]
        cut = [row[0] for row in rows if row is not None]
        contradictory = len(cut) == 2 and np.array_equal(cut[0].tokens, cut[1].tokens)
        for each, row in zip(judged, rows, strict=True):
            if row is None:
                continue
            if contradictory:
                fit.drop(index, _EQUAL)
                continue
            kept.append((index, row[0]))
            desirable.append(each.desirable)
            prompt_ids.append(known.setdefault(row[0].tokens[: row[0].prompt_length].tobytes(), len(known)))
    report = fit.report(desirable=sum(desirable))
    if len(known) < 2:
        raise DataError(
            f"{name}: its {len(source)} records hold completions of {len(known)} prompts, expected at least 2 "
            "because the KL is measured on completions of other prompts."
        )
    return JudgedExamples(
        _examples(kept, report), np.asarray(desirable, np.bool_), np.asarray(prompt_ids, np.int64)
    )


def ranked_examples(
    source: Records, tokenizer: Tokenizer, *, length: int, name: str, limits: Limits, candidates: int
) -> RankedExamples:
    """Tokenises rankings of at most `candidates` completions.

    Rankings that hold equal completions of different ranks once they are cut are left out.
    """
    fit = Fitter(source, name, length, limits)
    kept: list[list[tuple[np.ndarray, np.ndarray]]] = []
    ranks: list[np.ndarray] = []
    for index, record in enumerate(source):
        ranking = parse_ranking(record, where=fit.where(index))
        if len(ranking.completions) > candidates:
            raise DataError(
                f"{fit.where(index)}: holds {len(ranking.completions)} completions, expected at most candidates = "
                f"{candidates}."
            )
        rows = _answers(fit, index, ranking.prompt, ranking.completions, tokenizer)
        if rows is None:
            continue
        rank_of: dict[bytes, int] = {}
        pairs = zip(rows, ranking.ranks, strict=True)
        if all(rank_of.setdefault(row.tokens.tobytes(), rank) == rank for row, rank in pairs):
            kept.append([(row.tokens, row.loss_mask) for row in rows])
            ranks.append(np.asarray(ranking.ranks, np.int32))
        else:
            fit.drop(index, _EQUAL)
    return RankedExamples(kept, ranks, fit.report())


def prompt_examples(
    source: Records, tokenizer: Tokenizer, *, length: int, name: str, limits: Limits
) -> PromptExamples:
    """Tokenises the prompt of each record, ready for generation."""
    fit = Fitter(source, name, length, limits)
    kept: list[tuple[int, np.ndarray]] = []
    for index, record in enumerate(source):
        messages = prompt_messages(record, where=fit.where(index))
        tokens = fit.prompt(index, messages, render_prompt(messages, tokenizer))
        if tokens is not None:
            kept.append((index, tokens))
    ids = np.array([index for index, _ in kept], np.int32)
    return PromptExamples([tokens for _, tokens in kept], ids, fit.report())


_READERS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "chat": sft_examples,
        "preferences": preference_examples,
        "unpaired": judged_examples,
        "rankings": ranked_examples,
        "steps": step_examples,
        "prompts": prompt_examples,
    }
)


def check_lengths(
    kind: str,
    source: Records,
    tokenizer: Tokenizer,
    *,
    length: int,
    name: str,
    limits: Limits,
    candidates: int = 2,
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
    options = {"candidates": candidates} if kind == "rankings" else {}
    read = _READERS[kind](source, tokenizer, length=length, name=name, limits=limits, **options)
    report: DataReport = read.report
    return report


_EQUAL = "answers equal once cut"


def _answers(
    fit: Fitter, index: int, prompt: tuple[Message, ...], answers: Sequence[Message], tokenizer: Tokenizer
) -> list[Rendered] | None:
    """Several answers to one prompt as rows that fit, with loss on the answers; None where they are left out."""
    where = fit.where(index)
    rendered = [
        render_messages((*prompt, answer), tokenizer, where=where, train_on="last") for answer in answers
    ]
    return fit.rows(index, (*prompt, *answers), rendered)


def _examples(kept: Sequence[tuple[int, Rendered]], report: DataReport) -> Examples:
    return Examples(
        tokens=[example.tokens for _, example in kept],
        loss_masks=[example.loss_mask for _, example in kept],
        record_ids=np.array([index for index, _ in kept], np.int32),
        report=report,
    )
