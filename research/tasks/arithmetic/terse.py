"""Worked answers without their steps: demonstrations that mix worked and bare answers, as real ones do."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from research.config.schema import key
from research.core.errors import DataError


@dataclass(frozen=True)
class Terse:
    """Leaves the steps out of a share of generated answers, chosen by content: only the final line stays.

    A model fine-tuned on them writes both. A scorer must know bare answers too, or it takes them for safe ones: of
    labelled steps {steps, labels} the last one stays with its label; each side of a pair {chosen, rejected} is drawn
    for itself (a pair stays whole that would have equal sides).
    """

    fraction: float = key(0.5, "Share of answers whose steps are left out.", low=0, high=1)

    def __call__(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The record, with bare answers where they are drawn; DataError for one that was not generated."""
        texts = ("prompt", *(name for name in ("chosen", "rejected", "completion") if name in record))
        if not all(isinstance(record.get(name), str) for name in texts):
            raise DataError(
                f"transform terse: found the keys {', '.join(record)}, expected a generated record, whose prompt and "
                "answers are texts."
            )
        prompt = record["prompt"]
        if "chosen" in record:
            sides = [name for name in texts[1:] if self._draws(f"{prompt}{record[name]}")]
            changed = {**record, **{name: _last_line(record[name]) for name in sides}}
            return record if changed["chosen"] == changed["rejected"] else changed
        if "completion" in record:
            return {**record, "completion": _last_line(record["completion"])} if self._draws(prompt) else record
        if "labels" not in record or not self._draws(f"{prompt}{record['steps']}"):
            return record
        return {**record, "steps": record["steps"][-1:], "labels": record["labels"][-1:]}

    def _draws(self, content: str) -> bool:
        draw = int.from_bytes(hashlib.sha256(f"terse {content}".encode()).digest()[:8], "big") / 2**64
        return draw < self.fraction


def _last_line(text: str) -> str:
    return text.splitlines()[-1]


PROVIDES = {"transform": {"terse": Terse}}
