"""Records as tokens, once and in memory: what the pipelines draw from.

A set of N examples costs about five bytes a token. All of it is tokenised before the first batch, so a bad
record stops a run at its start and what truncation costs is known (`report`) before anything is trained.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from research.core.errors import DataError
from research.data.chat import (
    Message,
    Rendered,
    normalize_record,
    parse_turns,
    render_messages,
    render_prompt,
)
from research.data.preferences import parse_judged, parse_preference, parse_ranking
from research.data.steps import parse_steps, step_end_mask
from research.data.tokenizer import Tokenizer

Report = Mapping[str, int]


class Records(Protocol):
    """A random-access source of records; a list of dicts is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...

    def __iter__(self) -> Iterator[Mapping[str, Any]]: ...


@dataclass(frozen=True)
class Documents:
    """Documents end to end: `tokens` [sum(lengths)] int32, each BOS ... EOS, and `lengths` [N]."""

    tokens: np.ndarray
    lengths: np.ndarray
    report: Report


@dataclass(frozen=True)
class Examples:
    """N tokenised examples, each with its loss mask and the index of its record."""

    tokens: Sequence[np.ndarray]
    loss_masks: Sequence[np.ndarray]
    record_ids: np.ndarray
    report: Report

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


@dataclass(frozen=True)
class StepExamples:
    """N solutions: `rows` with loss masks that are True at the last token of each labelled step, and `labels`,
    float32 of the rows' lengths, 0 elsewhere.
    """

    rows: Examples
    labels: Sequence[np.ndarray]


@dataclass(frozen=True)
class JudgedExamples:
    """N completions: `rows`, `desirable` [N] bool, and `prompt_ids` [N], equal where prompts are."""

    rows: Examples
    desirable: np.ndarray
    prompt_ids: np.ndarray

    def parts(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(prompt, completion) tokens; the completion is what the loss mask covers, to the row's end."""
        start = int(self.rows.loss_masks[index].argmax())
        return self.rows.tokens[index][:start], self.rows.tokens[index][start:]


@dataclass(frozen=True)
class RankedExamples:
    """N rankings: `candidates[n]` are its completions as (tokens, loss mask), `ranks[n]` theirs from 0, best."""

    candidates: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]]
    ranks: Sequence[np.ndarray]
    report: Report


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
    report = {"examples": len(parts), "tokens": int(lengths.sum())}
    return Documents(np.concatenate(parts), lengths, report)


def sft_examples(source: Records, tokenizer: Tokenizer, *, length: int, name: str) -> Examples:
    """Tokenises conversations, cut to `length`; those left without a target are left out and counted."""
    kept: list[tuple[int, Rendered]] = []
    truncated = dropped = 0
    for index, record in enumerate(source):
        where = f"{name}: record {index}"
        whole = render_messages(normalize_record(record, where=where), tokenizer, where=where)
        cut = _truncate(whole, length)
        truncated += len(whole.tokens) > length
        if cut.loss_mask.any():
            kept.append((index, cut))
        else:
            dropped += 1
    if not kept:
        raise DataError(
            f"{name}: none of {len(source)} examples keeps a response token within length {length}; raise it."
        )
    report = {
        "examples": len(kept),
        "truncated": truncated,
        "dropped_truncated": dropped,
        "tokens": sum(len(example.tokens) for _, example in kept),
        "target_tokens": sum(int(example.loss_mask.sum()) for _, example in kept),
    }
    return _examples(kept, report)


def preference_examples(source: Records, tokenizer: Tokenizer, *, length: int, name: str) -> PairExamples:
    """Tokenises pairs, cut to `length`.

    Pairs that truncation leaves without a target on one side, or with equal sides, are left out and counted.
    """
    kept: list[tuple[int, Rendered, Rendered]] = []
    margins, soft_labels = [], []
    truncated = dropped = 0
    for index, record in enumerate(source):
        where = f"{name}: record {index}"
        pair = parse_preference(record, where=where)
        rendered = [
            render_messages((*pair.prompt, side), tokenizer, where=where, train_on="last")
            for side in (pair.chosen, pair.rejected)
        ]
        chosen, rejected = (_truncate(side, length) for side in rendered)
        truncated += any(len(side.tokens) > length for side in rendered)
        has_targets = bool(chosen.loss_mask.any() and rejected.loss_mask.any())
        if has_targets and not np.array_equal(chosen.tokens, rejected.tokens):
            kept.append((index, chosen, rejected))
            margins.append(pair.margin)
            soft_labels.append(pair.label_probability)
        else:
            dropped += 1
    if not kept:
        raise DataError(f"{name}: none of {len(source)} pairs keeps both responses within length {length}.")
    report = {"examples": len(kept), "truncated": truncated, "dropped_truncated": dropped}
    return PairExamples(
        _examples([(index, chosen) for index, chosen, _ in kept], report),
        _examples([(index, rejected) for index, _, rejected in kept], report),
        np.asarray(margins, np.float32),
        np.asarray(soft_labels, np.float32),
    )


def step_examples(
    source: Records,
    tokenizer: Tokenizer,
    *,
    length: int,
    labels: Literal["steps", "outcome"],
    name: str,
) -> StepExamples:
    """Tokenises solutions with labelled steps, cut to `length`.

    Args:
        source: records that `steps.parse_steps` reads.
        tokenizer: gives ids, and says where steps end.
        length: most tokens of a row; steps that end beyond it go, and rows left without a label are left out
            and counted.
        labels: "steps" (a process reward model), or "outcome": only the last label, at the solution's end.
        name: what an error message calls the source.
    """
    if labels not in ("steps", "outcome"):
        raise DataError(f"{name}: labels: got {labels!r}, expected one of steps, outcome.")
    kept: list[tuple[int, Rendered]] = []
    kept_labels: list[np.ndarray] = []
    truncated = dropped = 0
    for index, record in enumerate(source):
        where = f"{name}: record {index}"
        parsed = parse_steps(record, where=where)
        turns = (*parsed.prompt, Message("assistant", parsed.solution))
        whole = render_messages(turns, tokenizer, where=where, train_on="last")
        ends = np.flatnonzero(step_end_mask(whole.tokens, tokenizer, whole.loss_mask))
        if len(ends) != len(parsed.labels):
            raise DataError(
                f"{where}: its tokens hold {len(ends)} steps for {len(parsed.labels)} labels, expected one "
                "label a line of text."
            )
        pairs = [(end, label) for end, label in zip(ends, parsed.labels, strict=True) if label is not None]
        if labels == "outcome":
            pairs = [(ends[-1], pairs[-1][1])]
        mask = np.zeros(len(whole.tokens), np.bool_)
        values = np.zeros(len(whole.tokens), np.float32)
        for end, label in pairs:
            mask[end], values[end] = True, label
        cut = _truncate(Rendered(whole.tokens, mask, whole.prompt_length), length)
        truncated += len(whole.tokens) > length
        if cut.loss_mask.any():
            kept.append((index, cut))
            kept_labels.append(values[: len(cut.tokens)])
        else:
            dropped += 1
    if not kept:
        raise DataError(f"{name}: none of {len(source)} solutions keeps a label within length {length}.")
    report = {
        "examples": len(kept),
        "truncated": truncated,
        "dropped_truncated": dropped,
        "labels": sum(int(example.loss_mask.sum()) for _, example in kept),
    }
    return StepExamples(_examples(kept, report), kept_labels)


def judged_examples(source: Records, tokenizer: Tokenizer, *, length: int, name: str) -> JudgedExamples:
    """Tokenises judged completions (a preference pair gives two), cut to `length`.

    Those that truncation leaves without a target, and pairs that it makes equal, are left out and counted.

    Raises:
        DataError: fewer than two prompts are left, so that no completion can be put under another's prompt.
    """
    kept: list[tuple[int, Rendered]] = []
    desirable, prompt_ids = [], []
    known: dict[bytes, int] = {}
    truncated = dropped = 0
    for index, record in enumerate(source):
        where = f"{name}: record {index}"
        judged = parse_judged(record, where=where)
        whole = [
            render_messages((*each.prompt, each.completion), tokenizer, where=where, train_on="last")
            for each in judged
        ]
        cut = [_truncate(row, length) for row in whole]
        truncated += sum(len(row.tokens) > length for row in whole)
        contradictory = len(cut) == 2 and np.array_equal(cut[0].tokens, cut[1].tokens)
        for each, row in zip(judged, cut, strict=True):
            if contradictory or not row.loss_mask.any():
                dropped += 1
                continue
            kept.append((index, row))
            desirable.append(each.desirable)
            prompt_ids.append(known.setdefault(row.tokens[: row.prompt_length].tobytes(), len(known)))
    if len(known) < 2:
        raise DataError(
            f"{name}: {len(source)} records keep completions of {len(known)} prompts within length {length}, "
            "expected at least 2 because the KL is measured on completions of other prompts."
        )
    report = {
        "examples": len(kept),
        "truncated": truncated,
        "dropped_truncated": dropped,
        "desirable": sum(desirable),
    }
    return JudgedExamples(
        _examples(kept, report), np.asarray(desirable, np.bool_), np.asarray(prompt_ids, np.int64)
    )


def ranked_examples(
    source: Records, tokenizer: Tokenizer, *, length: int, candidates: int, name: str
) -> RankedExamples:
    """Tokenises rankings of at most `candidates` completions, cut to `length`.

    Rankings that truncation leaves with a completion without a target, or with equal completions of different
    ranks, are left out and counted.
    """
    kept: list[list[tuple[np.ndarray, np.ndarray]]] = []
    ranks: list[np.ndarray] = []
    truncated = dropped = 0
    for index, record in enumerate(source):
        where = f"{name}: record {index}"
        ranking = parse_ranking(record, where=where)
        if len(ranking.completions) > candidates:
            raise DataError(
                f"{where}: holds {len(ranking.completions)} completions, expected at most candidates = "
                f"{candidates}."
            )
        rendered = [
            render_messages((*ranking.prompt, completion), tokenizer, where=where, train_on="last")
            for completion in ranking.completions
        ]
        cut = [_truncate(row, length) for row in rendered]
        truncated += any(len(row.tokens) > length for row in rendered)
        rank_of: dict[bytes, int] = {}
        same = all(
            rank_of.setdefault(row.tokens.tobytes(), rank) == rank
            for row, rank in zip(cut, ranking.ranks, strict=True)
        )
        if same and all(row.loss_mask.any() for row in cut):
            kept.append([(row.tokens, row.loss_mask) for row in cut])
            ranks.append(np.unique(ranking.ranks, return_inverse=True)[1].astype(np.int32))
        else:
            dropped += 1
    if not kept:
        raise DataError(
            f"{name}: none of {len(source)} rankings keeps all completions within length {length}."
        )
    return RankedExamples(
        kept, ranks, {"examples": len(kept), "truncated": truncated, "dropped_truncated": dropped}
    )


def prompt_tokens(
    source: Records, tokenizer: Tokenizer, *, max_prompt_length: int, name: str
) -> list[np.ndarray]:
    """Tokenises the prompt of each record, ready for generation; one that is too long is refused."""
    prompts = []
    for index, record in enumerate(source):
        messages = prompt_messages(record, where=f"{name}: record {index}")
        tokens = render_prompt(messages, tokenizer)
        if len(tokens) > max_prompt_length:
            raise DataError(
                f"{name}: record {index}: the prompt has {len(tokens)} tokens, "
                f"expected at most max_prompt_length = {max_prompt_length}."
            )
        prompts.append(tokens)
    return prompts


def prompt_messages(record: Mapping[str, Any], *, where: str) -> tuple[Message, ...]:
    """The turns that ask for an answer: a record's `prompt`, or what precedes its last assistant turn."""
    if "prompt" in record:
        prompt = parse_turns(record["prompt"], role="user", where=f"{where}: prompt")
    else:
        messages = normalize_record(record, where=where)
        prompt = messages[:-1] if messages[-1].role == "assistant" else messages
    if not prompt or prompt[-1].role == "assistant":
        raise DataError(f"{where}: the prompt is empty or ends with an assistant turn, expected a user turn.")
    return prompt


def _examples(kept: Sequence[tuple[int, Rendered]], report: Report) -> Examples:
    return Examples(
        tokens=[example.tokens for _, example in kept],
        loss_masks=[example.loss_mask for _, example in kept],
        record_ids=np.array([index for index, _ in kept], np.int32),
        report=report,
    )


def _truncate(example: Rendered, length: int) -> Rendered:
    if len(example.tokens) <= length:
        return example
    return Rendered(example.tokens[:length], example.loss_mask[:length], example.prompt_length)
