"""Problems with a final answer, in any data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from research.config.schema import key
from research.data.chat import Message
from research.data.examples import prompt_messages
from research.tasks.answers import Matcher, extract_final_answer, matches
from research.tasks.sources import answer_of


@dataclass(frozen=True)
class AnswerTask:
    """Problems with a final answer.

    Attributes:
      matcher: where a completion states its answer, see `research/tasks/answers.py`.
    """

    matcher: Matcher = key(
        "mark", "Where a completion states its answer.", choices=("mark", "plain", "normalized")
    )

    def prompt(self, record: Mapping[str, Any]) -> tuple[Message, ...]:
        """The conversation before the answer."""
        return tuple(prompt_messages(record, where="problem"))

    def answer(self, record: Mapping[str, Any]) -> str:
        """The record's answer, or its whole last turn where it has none."""
        return answer_of(record)

    def extract(self, completion: str) -> str | None:
        """The final answer in canonical form."""
        return extract_final_answer(completion, self.matcher)

    def correct(self, completion: str, record: Mapping[str, Any]) -> float | None:
        """Whether the completion states the record's answer; None where the record has none."""
        answer = self.answer(record)
        return float(matches(completion, answer, self.matcher)) if answer.strip() else None
