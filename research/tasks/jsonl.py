"""Problems from a user's JSONL file: any of the chat shapes, with any further columns."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from statistics import median
from typing import Any, cast, get_args

from research.config.schema import key, short
from research.core.errors import DataError
from research.data.chat import Message, normalize_record, prompt_messages
from research.data.files import prepare_file
from research.data.records import first_records
from research.data.split import Split
from research.data.store import Prepared
from research.tasks.answers import Matcher, extract_final_answer, matches

_LOOKED_AT = 1000  # training records whose answers decide how answers are matched
_LONG = 80  # characters: a longer answer is prose, which no comparison of texts can judge
_NEARLY_ALL = 0.95  # share of reference responses that must be right under the strictest matcher that is chosen
_MOST = 0.5  # the same, where none is right about nearly all


@dataclasses.dataclass(frozen=True)
class Jsonl:
    """Problems with a final answer, in any data.

    A record is {prompt, completion}, {prompt, answer}, {messages}, {question, answer} or {conversations}. Its answer
    is the column `answer` (text, a number, or a list of which any is right), else its response.
    """

    path: str = key("", "A JSONL or JSON file.")
    answer_format: str = key(
        "auto",
        "Where a completion states its answer: behind '####' or in \\boxed{} (mark), the whole of it or its last line "
        "(plain), or as mark, else its last number or last line in any case (normalized); none judges nothing. auto "
        "chooses what the file's responses look like.",
        choices=("auto", *get_args(Matcher), "none"),
    )

    def prepare(self, data_dir: Path, split: Split) -> Prepared:
        """The file's rows; DataError names the line of one that cannot be used."""
        if not self.path:
            name = type(self).__name__.lower()
            raise DataError(f"data.problems.{name}.path: got '', expected a JSONL file because the task reads one.")
        return prepare_file("chat", data_dir, self.path, split, self.check)

    def check(self, record: Mapping[str, Any], where: str) -> None:
        """Raises DataError where the record's answer could never be matched."""
        value = record.get("answer")
        answers = value if isinstance(value, list) and value else [value]
        if value is not None and not all(isinstance(each, str | int | float) and answer_text(each) for each in answers):
            raise DataError(
                f"{where}: answer: got {short(value)}, expected text, a number, or a list of them, none of them blank."
            )

    def fit(self, prepared: Prepared) -> tuple["Jsonl", str]:
        """The task with `answer_format` chosen or checked by the training records' reference responses."""
        records = [dict(record) for record in first_records(prepared.train, _LOOKED_AT)]
        examples = [
            (response, answer)
            for record in records
            if (response := _response(record)) and (answer := self.answer(record))
        ]
        right = {how: sum(matches(text, answer, how) for text, answer in examples) for how in get_args(Matcher)}
        counts = ", ".join(f"{how} {count:,}" for how, count in right.items())
        found = f"of {len(examples):,} reference responses {counts} would be right"
        if self.answer_format == "auto":
            how, why = _choose([answers_of(record) for record in records], examples, right)
            return dataclasses.replace(self, answer_format=how), f"answer_format={how}: {why or found}"
        if examples and not right.get(cast(Matcher, self.answer_format), 1):
            raise DataError(
                f"data.problems: answer_format={self.answer_format} finds no answer, so that no completion could be "
                f"right: {found}."
            )
        return self, f"answer_format={self.answer_format}: {found}"

    def prompt(self, record: Mapping[str, Any]) -> tuple[Message, ...]:
        """The conversation before the answer."""
        return prompt_messages(record, where="problem")

    def answer(self, record: Mapping[str, Any]) -> str:
        """The first of the record's answers, or its response; "" where it has neither."""
        return next(iter(answers_of(record)), "")

    def extract(self, completion: str) -> str | None:
        """The final answer in canonical form."""
        how = self._matcher
        return None if how is None else extract_final_answer(completion, how)

    def correct(self, completion: str, record: Mapping[str, Any]) -> float | None:
        """Whether the completion states one of the record's answers; None where there are none."""
        how, answers = self._matcher, answers_of(record)
        if how is None or not answers:
            return None
        return float(any(matches(completion, answer, how) for answer in answers))

    @property
    def _matcher(self) -> Matcher | None:
        """As chosen; before `fit` has chosen, the most lenient."""
        if self.answer_format == "none":
            return None
        return "normalized" if self.answer_format == "auto" else cast(Matcher, self.answer_format)


def answers_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """All texts that are right: of the record's answer or answers, else its response."""
    value = record.get("answer")
    if value is None:
        response = _response(record)
        return (response,) if response else ()
    return tuple(filter(None, map(answer_text, value if isinstance(value, list) else [value])))


def answer_text(value: Any) -> str:
    """An answer as text: 1e-05 is "0.00001", as a completion would write it; "" where it is blank or not finite."""
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f") if math.isfinite(value) else ""
    return str(value).strip()


def _response(record: Mapping[str, Any]) -> str:
    """The content of the last turn, where an assistant wrote it."""
    last = normalize_record(record, where="problem")[-1]
    return last.content if last.role == "assistant" else ""


def _choose(
    answers: Sequence[Sequence[str]], examples: Sequence[tuple[str, str]], right: Mapping[Matcher, int]
) -> tuple[str, str]:
    """How answers are matched, and why where it is not for the reference responses.

    Args:
      answers: of each record.
      examples: (reference response, answer).
      right: by matcher, from strict to lenient: in how many examples it finds the answer.
    """
    stated = [extract_final_answer(each[0], "mark") or each[0] for each in answers if each]
    long = sum(len(text) > _LONG or "\n" in text for text in stated)
    if not stated:
        return "none", "the records have no answers; completions are not judged"
    if long > _MOST * len(stated):
        return "none", (
            f"{long:,} of {len(stated):,} answers are long texts (median {median(map(len, stated)):,.0f} characters), "
            "which no completion could match; completions are not judged"
        )
    if not examples:
        marked = sum(extract_final_answer(each[0], "mark") is not None for each in answers if each)
        how = "mark" if marked > _MOST * len(stated) else "normalized"
        return (how, f"{marked:,} of {len(stated):,} answers are marked by #### or \\boxed, and there are no responses")
    nearly_all = [how for how in right if right[how] >= _NEARLY_ALL * len(examples)]
    best = max(right, key=lambda how: right[how])
    if nearly_all or right[best] > _MOST * len(examples):
        return nearly_all[0] if nearly_all else best, ""
    return "none", (
        f"of {len(examples):,} reference responses at most {right[best]:,} state their answer where it is looked for; "
        "completions are not judged"
    )


PROVIDES = {"task": {"jsonl": Jsonl}}
