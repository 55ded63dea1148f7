"""Random-access records, and views of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

Record = Mapping[str, Any]


class Records(Protocol):
    """A random-access source of records; a list of dicts is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...

    def __iter__(self) -> Iterator[Record]: ...


@runtime_checkable
class Placed(Protocol):
    """A source that knows where each of its records was read."""

    def place(self, index: int) -> str:
        """File and line or record, such as "train.jsonl:12"."""


def place_of(source: Records, index: int) -> str:
    """What an error calls a record: its file and line where they are known, else its number in the source."""
    return source.place(index) if isinstance(source, Placed) else f"record {index}"


@dataclass(frozen=True)
class Selected:
    """Some records of a source, by number and in that order, each passed through a function."""

    source: Records
    numbers: Sequence[int]
    change: Callable[[Record], Record] = lambda record: record

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self.change(self.source[self.numbers[index]])

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def place(self, index: int) -> str:
        """As of the source."""
        return place_of(self.source, self.numbers[index])


def first_records(source: Records, limit: int, change: Callable[[Record], Record] = lambda record: record) -> Selected:
    """The first `limit` records of a source (0: all), each passed through a function."""
    return Selected(source, range(min(limit, len(source)) if limit else len(source)), change)
