"""Records as tokens, once and in memory: what the pipelines draw from.

A set of N examples costs about five bytes a token. All of it is tokenised before the first batch, so a bad
record stops a run at its start and what truncation costs is known (`report`) before anything is trained.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from research.data.chat import (
    Message,
    Rendered,
    normalize_record,
    parse_turns,
    render_messages,
    render_prompt,
)
from research.data.preferences import parse_preference
from research.data.tokenizer import Tokenizer
from research.errors import DataError

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
    return Examples(
        tokens=[example.tokens for _, example in kept],
        loss_masks=[example.loss_mask for _, example in kept],
        record_ids=np.array([index for index, _ in kept], np.int32),
        report={
            "examples": len(kept),
            "truncated": truncated,
            "dropped_truncated": dropped,
            "tokens": sum(len(example.tokens) for _, example in kept),
            "target_tokens": sum(int(example.loss_mask.sum()) for _, example in kept),
        },
    )


def preference_examples(
    source: Records, tokenizer: Tokenizer, *, length: int, name: str
) -> tuple[Examples, Examples]:
    """Tokenises pairs as (chosen, rejected), cut to `length`.

    Pairs that truncation leaves without a target on one side, or with equal sides, are left out and counted.
    """
    kept: list[tuple[int, Rendered, Rendered]] = []
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
        else:
            dropped += 1
    if not kept:
        raise DataError(f"{name}: none of {len(source)} pairs keeps both responses within length {length}.")
    ids = np.array([index for index, _, _ in kept], np.int32)
    report = {"examples": len(kept), "truncated": truncated, "dropped_truncated": dropped}
    chosen_sides, rejected_sides = [pair[1] for pair in kept], [pair[2] for pair in kept]
    chosen_set, rejected_set = (
        Examples([side.tokens for side in sides], [side.loss_mask for side in sides], ids, report)
        for sides in (chosen_sides, rejected_sides)
    )
    return chosen_set, rejected_set


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


def _truncate(example: Rendered, length: int) -> Rendered:
    if len(example.tokens) <= length:
        return example
    return Rendered(example.tokens[:length], example.loss_mask[:length], example.prompt_length)
