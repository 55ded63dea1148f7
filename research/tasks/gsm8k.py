"""GSM8K and data of its form: questions with worked answers that end in "#### 18".

Source: Cobbe et al. 2021, Section 2. Calculator marks (<<48/2=24>>) are stripped from what is trained on.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from research.config.schema import key
from research.core.errors import DataError
from research.tasks.answers import MARK
from research.tasks.jsonl import Jsonl


@dataclasses.dataclass(frozen=True)
class Gsm8k(Jsonl):
    """Records {question, answer}; an answer is right behind "####"."""

    answer_format: str = key("mark", "Where a completion states its answer.", choices=("mark",))

    def check(self, record: Mapping[str, Any], where: str) -> None:
        """Raises DataError for a record of another form."""
        super().check(record, where)
        answer = record.get("answer")
        if not isinstance(answer, str) or not answer.rpartition("\n")[2].startswith(MARK):
            raise DataError(f"{where}: answer: its last line does not begin with {MARK!r}, as GSM8K's does.")


PROVIDES = {"task": {"gsm8k": Gsm8k}}
