"""The generated arithmetic task, and judged solutions to it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from research.config.schema import key
from research.data.chat import Message, prompt_messages
from research.data.split import Split
from research.data.store import Prepared, Row, Splits, prepare
from research.tasks.answers import extract_final_answer, matches
from research.tasks.arithmetic.corruption import CORRUPTION, pair_records, ranking_records, step_records
from research.tasks.arithmetic.problems import ArithmeticSpec, Item, split_items

_KIND = "chain"
Make = Callable[..., Sequence[Mapping[str, Any]]]
"""An item, and options by name -> its records."""


@dataclass(frozen=True)
class Arithmetic(ArithmeticSpec):
    """Integer expressions with worked answers, each step of which can be checked.

    Records are {prompt, completion, answer, steps, difficulty, kind}; the completion ends with "#### answer".
    """

    train: int = key(20_000, "Problems to train on.", low=1)
    test: int = key(512, "Problems held out, by content.", low=1)
    seed: int = key(0, "Of the generator.", low=0, high=2**31 - 1)

    def prepare(self, data_dir: Path, split: Split) -> Prepared:
        """Generated problems, each once; DataError where fewer exist."""
        return self._prepare("arithmetic", data_dir, split, self.train, self.test, _problem)

    def preferences(self, data_dir: Path, split: Split, *, train: int, validation: int) -> Prepared:
        """The right worked answer over a corrupted one."""
        return self._judged("preferences", pair_records, data_dir, split, train, validation)

    def rankings(self, data_dir: Path, split: Split, *, train: int, validation: int, candidates: int) -> Prepared:
        """A right answer, then wrong ones, better the later they go wrong."""
        return self._judged("rankings", ranking_records, data_dir, split, train, validation, candidates=candidates)

    def steps(self, data_dir: Path, split: Split, *, train: int, validation: int) -> Prepared:
        """Two records a problem: a right solution and a corrupted one."""
        return self._judged("steps", step_records, data_dir, split, train, validation)

    def _judged(
        self, kind: str, records: Make, data_dir: Path, split: Split, train: int, validation: int, **options: int
    ) -> Prepared:
        make = partial(records, seed=self.seed, max_value=self.max_value, **options)
        return self._prepare(kind, data_dir, split, train, validation, make, corruption=CORRUPTION, **options)

    def _prepare(
        self, kind: str, data_dir: Path, split: Split, train: int, validation: int, make: Make, **inputs: int
    ) -> Prepared:
        """The records that `make` gives for each of so many problems."""

        def load() -> Splits:
            items = split_items(train, validation, seed=self.seed, split=split, spec=self)
            named = zip(("train", "validation"), items, strict=True)
            return {name: [Row(record) for item in part for record in make(item)] for name, part in named}

        spec = {each.name: getattr(self, each.name) for each in fields(ArithmeticSpec)}
        sizes = {"train": train, "validation": validation, "seed": self.seed}
        made = {"generator": "arithmetic", "spec": {**spec, "shape": _KIND}, "split": asdict(split), **sizes, **inputs}
        return prepare(kind, data_dir, inputs=made, load=load)

    def prompt(self, record: Mapping[str, Any]) -> tuple[Message, ...]:
        """The expression."""
        return prompt_messages(record, where="problem")

    def answer(self, record: Mapping[str, Any]) -> str:
        """The value of the expression."""
        return str(record["answer"])

    def extract(self, completion: str) -> str | None:
        """The number behind "####"."""
        return extract_final_answer(completion, "mark")

    def correct(self, completion: str, record: Mapping[str, Any]) -> float | None:
        """Whether that number is the value of the expression."""
        return float(matches(completion, self.answer(record), "mark"))


def _problem(item: Item) -> Sequence[Mapping[str, Any]]:
    record = {"prompt": item.prompt, "completion": item.solution, "answer": item.answer, "kind": _KIND}
    return [{**record, "steps": list(item.steps), "difficulty": len(item.steps)}]


PROVIDES = {"task": {"arithmetic": Arithmetic}}
