"""What a task is: records, their prompts, and how completions are judged."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from research.data.chat import Message, normalize_record
from research.data.split import Split
from research.data.store import Prepared


class Task(Protocol):
    """A component of kind "task"; a record is a row of its data with every column."""

    def prepare(self, data_dir: Path, split: Split) -> Prepared:
        """Its records: to train on, and held out by `split`. What takes long to make is kept in `data_dir`."""

    def prompt(self, record: Mapping[str, Any]) -> tuple[Message, ...]:
        """The conversation before the answer."""

    def answer(self, record: Mapping[str, Any]) -> str:
        """What a completion is compared with; "" where there is none."""

    def extract(self, completion: str) -> str | None:
        """The final answer in canonical form, for votes: equal answers are spelled alike; None where there is none."""

    def correct(self, completion: str, record: Mapping[str, Any]) -> float | None:
        """1 for right, 0 for wrong, None where it cannot be told."""


@runtime_checkable
class Fits(Protocol):
    """A task that looks at its data before it judges completions."""

    def fit(self, prepared: Prepared) -> tuple[Task, str]:
        """The task as these data need it, and a sentence on what was chosen; DataError if nothing could be right."""


@runtime_checkable
class Generates(Protocol):
    """A task that can make judged solutions to so many of its problems."""

    def preferences(self, data_dir: Path, split: Split, *, train: int, validation: int) -> Prepared:
        """Pairs {prompt, chosen, rejected}."""

    def rankings(self, data_dir: Path, split: Split, *, train: int, validation: int, candidates: int) -> Prepared:
        """Rankings {prompt, completions, ranks}."""

    def steps(self, data_dir: Path, split: Split, *, train: int, validation: int) -> Prepared:
        """Solutions {prompt, steps, labels}."""


def worked_text(record: Mapping[str, Any]) -> dict[str, str]:
    """A problem as plain text for pretraining: the question, then the worked answer."""
    return {"text": "\n".join(message.content for message in normalize_record(record, where="problem"))}
