"""Records as tokens, once and in memory: what the pipelines draw from.

A set of N examples costs about five bytes a token. All of it is tokenised before the first batch, so a bad record
stops a run at its start, and what does not fit is known (`DataReport`) before anything is trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from research.core.errors import DataError
from research.data.chat import Rendered, normalize_record, prompt_messages, render_messages, render_prompt
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


def sft_examples(source: Records, tokenizer: Tokenizer, *, length: int, name: str, limits: Limits) -> Examples:
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


def prompt_examples(source: Records, tokenizer: Tokenizer, *, length: int, name: str, limits: Limits) -> PromptExamples:
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


def _examples(kept: Sequence[tuple[int, Rendered]], report: DataReport) -> Examples:
    return Examples(
        tokens=[example.tokens for _, example in kept],
        loss_masks=[example.loss_mask for _, example in kept],
        record_ids=np.array([index for index, _ in kept], np.int32),
        report=report,
    )
