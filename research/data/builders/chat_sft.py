"""Conversations from a JSONL file, in any of the shapes of `research.data.chat`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from research.data.builders.base import MESSAGES, Prepared, Record, RecordsBuilder, message_records
from research.data.builders.file import FileSpec, prepare_file
from research.data.chat import normalize_record, split_response


@dataclass(frozen=True)
class ChatSpec(FileSpec):
    """A FileSpec, and `strip_calculator`: see `chat`."""

    validation_one_in: int = 20
    strip_calculator: bool = True


class TemperChatSft(RecordsBuilder):
    """Records {messages, answer}; `answer` is the record's own answer text, "" where it has none."""


def prepare_chat_sft(data_dir: str | Path, spec: ChatSpec) -> Prepared:
    """Splits "train" and "validation"; the prompt decides which, so one prompt is never in both."""

    def parse(record: Mapping[str, Any], where: str) -> Iterable[tuple[object, Record]]:
        messages = normalize_record(record, where=where, strip_calculator=spec.strip_calculator)
        prompt, _ = split_response(messages, where=where)
        answer = record.get("answer")
        yield prompt, {"messages": message_records(messages), "answer": "" if answer is None else str(answer)}

    features = {"messages": MESSAGES, "answer": tfds.features.Text()}
    return prepare_file(
        TemperChatSft, data_dir, spec, features=features, parse=parse, strip_calculator=spec.strip_calculator
    )
