"""Records that do not fit their limits: what happens to them, and how many there were."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from research.core.errors import DataError
from research.data.chat import Message, Rendered
from research.data.records import Records, place_of

TooLong = Literal["error", "drop", "truncate"]

TRUNCATED, LOST_END = "truncated", "end of turn lost"


@dataclass(frozen=True)
class Limits:
    """What happens to records that do not fit (`data.too_long`, `data.max_dropped`).

    Attributes:
        too_long: "error" refuses the first one; "drop" leaves it out; "truncate" cuts it, and leaves it out where
            nothing to learn remains. An empty turn is refused under "error", else left out.
        max_dropped: largest share of a source that may be left out.
    """

    too_long: TooLong = "error"
    max_dropped: float = 0.0


@dataclass(frozen=True)
class DataReport:
    """What became of a source's records.

    Attributes:
        name: of the source, for people.
        records, kept: how many there were, and how many are used.
        dropped: reason -> how many were left out.
        changed: how many were truncated, and how many of those lost the token that ends a turn.
        sizes: counts of what is used, such as tokens.
    """

    name: str
    records: int
    kept: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    changed: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    def line(self) -> str:
        """One line for the console; says no more than the number of records where all fit."""
        parts = [f"{self.name}: {self.records:,} records"]
        if self.dropped:
            parts.append(f"{self.records - self.kept:,} dropped ({_listed(self.dropped)})")
        if self.changed:
            lost = self.changed.get(LOST_END, 0)
            ends = f" ({lost:,} lost their end of turn)" if lost else ""
            parts.append(f"{self.changed[TRUNCATED]:,} truncated{ends}")
        return ", ".join(parts)

    def metrics(self) -> dict[str, float]:
        """Counts as metrics: records, dropped, truncated, end_of_turn_lost."""
        return {
            "data/records": float(self.records),
            "data/dropped": float(self.records - self.kept),
            "data/truncated": float(self.changed.get(TRUNCATED, 0)),
            "data/end_of_turn_lost": float(self.changed.get(LOST_END, 0)),
        }

    def record(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {"records": self.records, "kept": self.kept, "dropped": dict(self.dropped), **self.changed, **self.sizes}


class Fitter:
    """Applies `Limits` to the records of one source, one after the other, and counts what it does."""

    def __init__(self, source: Records, name: str, length: int, limits: Limits) -> None:
        """Nothing counted yet; `length` is that of the longest row, or prompt, that fits."""
        self.source, self.name, self.length, self.limits = source, name, length, limits
        self._seen = self._longest = 0
        self._key = "length"
        self._dropped: Counter[str] = Counter()
        self._changed: Counter[str] = Counter()
        self._first = ""

    def where(self, index: int) -> str:
        """What an error calls a record."""
        return f"{self.name}: {place_of(self.source, index)}"

    def drop(self, index: int, reason: str, detail: str = "") -> None:
        """Leaves a record out and counts it; DataError where `Limits` leave out none."""
        if self.limits.too_long == "error":
            raise DataError(f"{self.where(index)}: {detail or reason}; data.too_long can drop such records.")
        self._first = self._first or self.where(index)
        self._dropped[reason] += 1

    def rows(self, index: int, messages: Sequence[Message], rendered: Sequence[Rendered]) -> list[Rendered]:
        """A record's rows, cut where they are too long and may be cut; none of them where it is left out.

        Args:
            index: the record's number.
            messages: all of its turns.
            rendered: its rows, kept or left out together.
        """
        longest = self._see(max(len(row.tokens) for row in rendered))
        cut = [Rendered(row.tokens[: self.length], row.loss_mask[: self.length], row.prompt_length) for row in rendered]
        sizes = f"has {longest} tokens, expected at most length = {self.length}, which holds"
        if any(message.empty for message in messages):
            self.drop(index, "empty turn", "has a turn that is empty")
        elif not all(row.loss_mask.any() for row in rendered):
            self.drop(index, "nothing to learn", "no turn of an assistant carries loss")
        elif not all(row.loss_mask.any() for row in cut):
            self.drop(index, "prompt too long", f"{sizes} no token of the response")
        elif longest > self.length and self.limits.too_long != "truncate":
            self.drop(index, "row too long", f"{sizes} not all of the response")
        else:
            if longest > self.length:
                self._changed[TRUNCATED] += 1
                at_cut = slice(self.length - 1, self.length + 1)  # both carry loss where the cut is inside a turn
                self._changed[LOST_END] += any(row.loss_mask[at_cut].sum() == 2 for row in rendered)
            return cut
        return []

    def prompt(self, index: int, messages: Sequence[Message], tokens: np.ndarray) -> np.ndarray | None:
        """A prompt [T] that fits; a longer one keeps its first token (BOS) and its last ones, where it may be cut."""
        self._key = "max_prompt_length"
        longest = self._see(len(tokens))
        if messages[-1].empty:
            self.drop(index, "empty turn", "the prompt is empty")
        elif longest <= self.length:
            return tokens
        elif self.limits.too_long == "truncate":
            self._changed[TRUNCATED] += 1
            return np.concatenate([tokens[:1], tokens[len(tokens) - self.length + 1 :]])
        else:
            sizes = f"the prompt has {longest} tokens, expected at most {self._key} = {self.length}"
            self.drop(index, "prompt too long", sizes)
        return None

    def report(self, **sizes: int) -> DataReport:
        """The counts.

        Raises:
            DataError: no record is left, or more were left out than `Limits` allow.
        """
        dropped = self._dropped.total()
        if not self._seen:
            raise DataError(f"{self.name}: holds no records, expected at least one.")
        if dropped == self._seen or dropped > self.limits.max_dropped * self._seen:
            most = f"more than data.max_dropped={self.limits.max_dropped:g}"
            raise DataError(
                f"{self.name}: {dropped} of {self._seen} records do not fit {self.length} tokens or are empty "
                f"({_listed(self._dropped)}; the first is {self._first}), "
                f"{'which are all' if dropped == self._seen else most}; the longest has {self._longest} tokens, "
                f"expected at most {self._key} = {self.length}."
            )
        return DataReport(self.name, self._seen, self._seen - dropped, dict(self._dropped), dict(self._changed), sizes)

    def _see(self, tokens: int) -> int:
        self._seen += 1
        self._longest = max(self._longest, tokens)
        return tokens


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
