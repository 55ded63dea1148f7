"""Rows of a user's JSONL or JSON file as a prepared data set: checked line by line, divided by their prompts."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from research.core.errors import DataError
from research.data.chat import Message, before_response, normalize_record, prompt_messages
from research.data.jsonl import read_records
from research.data.preferences import parse_judged, parse_preference, parse_ranking
from research.data.split import Split, prompt_key
from research.data.steps import parse_steps
from research.data.store import Prepared, Row, Splits, file_hash, prepare

Kind = Literal["chat", "preferences", "unpaired", "rankings", "steps"]
Prompt = Callable[[Mapping[str, Any], str], tuple[Message, ...]]
"""(record, where) -> the prompt that the record is about; raises DataError where the record cannot be used."""


def _chat_prompt(record: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    prompt = prompt_messages(record, where=where)
    if "answer" not in record:  # nothing but a response can then be learned or compared with
        before_response(normalize_record(record, where=where), where=where)
    return prompt


PROMPTS: Mapping[Kind, Prompt] = MappingProxyType(
    {
        "chat": _chat_prompt,
        "preferences": lambda record, where: parse_preference(record, where=where).prompt,
        "unpaired": lambda record, where: parse_judged(record, where=where)[0].prompt,
        "rankings": lambda record, where: parse_ranking(record, where=where).prompt,
        "steps": lambda record, where: parse_steps(record, where=where).prompt,
    }
)


def prepare_file(
    kind: Kind,
    data_dir: str | Path,
    path: str | Path,
    split: Split,
    check: Callable[[Mapping[str, Any], str], None] | None = None,
) -> Prepared:
    """Splits of a file's rows; a hash of the prompt decides, so one prompt is never in both.

    Args:
        kind: which shapes of records are expected.
        data_dir: where prepared data sets live.
        path: the file.
        split: what is held out.
        check: raises DataError for a record (and the place it is named by) that cannot be used, as this function does.
    """
    path = Path(path)

    def load() -> Splits:
        rows, prompts = [], []
        for number, record in read_records(path):
            where = f"{path}:{number}"
            key = prompt_key(PROMPTS[kind](record, where))
            if not key:
                raise DataError(f"{where}: the prompt is empty.")
            if check is not None:
                check(record, where)
            rows.append(Row(record, f"{path.name}:{number}"))
            prompts.append(key)
        return split.divide(rows, prompts, name=str(path))

    inputs = {"file": path.name, "file_sha256": file_hash(path), "split": asdict(split)}
    return prepare(kind, data_dir, inputs=inputs, load=load)
