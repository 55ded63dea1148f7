"""Records as tokens, once and in memory: what the pipelines draw from.

A set of N examples costs about five bytes a token. All of it is tokenised before the first batch, so a bad record
stops a run at its start, and what does not fit is known (`DataReport`) before anything is trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from research.core.errors import DataError
from research.data.chat import Rendered, normalize_record, prompt_messages, render_messages, render_prompt
from research.data.packing import Row
from research.data.records import Records
from research.data.report import DataReport, Fitter, Limits
from research.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Documents:
    """Documents end to end: `tokens` [sum(lengths)] int32, each BOS ... EOS, and `lengths` [N]."""

    tokens: np.ndarray
    lengths: np.ndarray
    report: DataReport


@dataclass(frozen=True)
class Examples:
    """N tokenised examples."""

    rows: Sequence[Rendered]
    report: DataReport

    @property
    def lengths(self) -> np.ndarray:
        """[N] tokens of each example."""
        return np.array([len(row.tokens) for row in self.rows], np.int64)


@dataclass(frozen=True)
class PromptExamples:
    """N prompts ready for generation, and the index [N] of each one's record."""

    tokens: Sequence[np.ndarray]
    record_ids: np.ndarray
    report: DataReport

    def row(self, index: int | None, length: int, pad_id: int) -> Row:
        """A prompt, left-padded to `length`; None is padding alone."""
        tokens = self.tokens[index] if index is not None else np.zeros(0, np.int32)
        record_id = self.record_ids[index] if index is not None else -1
        mask = np.arange(length) >= length - len(tokens)
        padding = np.full(length - len(tokens), pad_id, np.int32)
        row = {"prompt_tokens": np.concatenate([padding, tokens]), "prompt_mask": mask}
        return {**row, "prompt_id": np.asarray(record_id, np.int32)}


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


def sft_examples(source: Records, tokenizer: Tokenizer, *, length: int, name: str, limits: Limits) -> Examples:
    """Tokenises conversations, whose assistant turns carry loss."""
    fit = Fitter(source, name, length, limits)
    kept: list[Rendered] = []
    for index, record in enumerate(source):
        messages = normalize_record(record, where=fit.where(index))
        rendered = render_messages(messages, tokenizer, where=fit.where(index))
        kept += fit.rows(index, messages, [rendered])
    targets = sum(int(row.loss_mask.sum()) for row in kept)
    return Examples(kept, fit.report(tokens=sum(len(row.tokens) for row in kept), target_tokens=targets))


def prompt_examples(source: Records, tokenizer: Tokenizer, *, length: int, name: str, limits: Limits) -> PromptExamples:
    """Tokenises the prompt of each record, ready for generation."""
    fit = Fitter(source, name, length, limits)
    kept: dict[int, np.ndarray] = {}
    for index, record in enumerate(source):
        messages = prompt_messages(record, where=fit.where(index))
        tokens = fit.prompt(index, messages, render_prompt(messages, tokenizer))
        if tokens is not None:
            kept[index] = tokens
    return PromptExamples(list(kept.values()), np.array(list(kept), np.int32), fit.report())
