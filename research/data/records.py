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


class _Derived:
    """Records of another source, by number; subclasses say which."""

    source: Records

    def number(self, index: int) -> int:
        """The record's number in the source."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self.source[self.number(index)]

    def __iter__(self) -> Iterator[Record]:
        for index in range(len(self)):
            yield self[index]

    def place(self, index: int) -> str:
        """As of the source."""
        return place_of(self.source, self.number(index))


@dataclass(frozen=True)
class View(_Derived):
    """The first `limit` records of a source (0: all), each passed through a function."""

    source: Records
    limit: int
    change: Callable[[Record], Record] = lambda record: record

    def number(self, index: int) -> int:
        """The first ones, in their order."""
        return index

    def __len__(self) -> int:
        return min(self.limit, len(self.source)) if self.limit else len(self.source)

    def __getitem__(self, index: int) -> Record:
        return self.change(super().__getitem__(index))


@dataclass(frozen=True)
class Selected(_Derived):
    """Some records of a source, by number."""

    source: Records
    numbers: Sequence[int]

    def number(self, index: int) -> int:
        """The chosen ones, in the order given."""
        return self.numbers[index]

    def __len__(self) -> int:
        return len(self.numbers)
