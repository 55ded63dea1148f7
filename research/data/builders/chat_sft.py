"""Conversations from a JSONL file, in any of the shapes of `research.data.chat`."""

from dataclasses import dataclass
from pathlib import Path

import tensorflow_datasets as tfds

from research.data.builders.base import (
    MESSAGES,
    Prepared,
    RecordsBuilder,
    Splits,
    check_one_in,
    file_hash,
    message_records,
    prepare,
    split_by_content,
)
from research.data.chat import normalize_record, split_response
from research.data.jsonl import read_records


@dataclass(frozen=True)
class ChatSpec:
    """`path`: the file. `validation_one_in`: share held out, 0 for none. `strip_calculator`: see `chat`."""

    path: str
    validation_one_in: int = 20
    strip_calculator: bool = True


class TemperChatSft(RecordsBuilder):
    """Records {messages, answer}; `answer` is the record's own answer text, "" where it has none."""


def prepare_chat_sft(data_dir: str | Path, spec: ChatSpec) -> Prepared:
    """Splits "train" and "validation"; the prompt decides which, so one prompt is never in both."""
    path = Path(spec.path)
    check_one_in(spec.validation_one_in, name=spec.path)

    def load() -> Splits:
        records, prompts = [], []
        for number, record in read_records(path):
            where = f"{path}:{number}"
            messages = normalize_record(record, where=where, strip_calculator=spec.strip_calculator)
            prompt, _ = split_response(messages, where=where)
            answer = record.get("answer")
            records.append(
                {"messages": message_records(messages), "answer": "" if answer is None else str(answer)}
            )
            prompts.append(repr(prompt))
        return split_by_content(records, prompts, validation_one_in=spec.validation_one_in, name=spec.path)

    inputs = {
        "file": path.name,
        "file_sha256": file_hash(path),
        "strip_calculator": spec.strip_calculator,
        "validation_one_in": spec.validation_one_in,
    }
    features = {"messages": MESSAGES, "answer": tfds.features.Text()}
    return prepare(TemperChatSft, data_dir, inputs=inputs, features=features, load=load)
