"""What a task is: records, their prompts, and how completions are judged."""

from collections.abc import Mapping
from typing import Any, Protocol

from research.data.chat import Message


class Task(Protocol):
    """A component of kind "task"; a record is a row of its data with every column."""

    def prompt(self, record: Mapping[str, Any]) -> tuple[Message, ...]:
        """The conversation before the answer."""

    def answer(self, record: Mapping[str, Any]) -> str:
        """What a completion is compared with; "" where there is none."""

    def extract(self, completion: str) -> str | None:
        """The final answer in canonical form, for votes: equal answers are spelled alike; None where there is none."""

    def correct(self, completion: str, record: Mapping[str, Any]) -> float | None:
        """1 for right, 0 for wrong, None where it cannot be told."""
