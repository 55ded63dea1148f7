"""The generated arithmetic task, and judged solutions to it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from research.config.schema import key
from research.data.chat import Message, prompt_messages
from research.data.split import Split
from research.data.store import Prepared, Row, Splits, prepare
from research.tasks.answers import extract_final_answer, matches
from research.tasks.arithmetic.corruption import CORRUPTION, pair_record, ranking_record, step_records
from research.tasks.arithmetic.problems import ArithmeticSpec, Item, split_items

Make = Callable[[Item], Sequence[Mapping[str, Any]]]
"""An item -> its records."""


@dataclass(frozen=True)
class Arithmetic:
    """Integer expressions with worked answers, each step of which can be checked.

    Records are {prompt, completion, answer, steps, difficulty, kind}; the completion ends with "#### answer".
    """

    train: int = key(20_000, "Problems to train on.", low=1)
    test: int = key(512, "Problems held out, by content.", low=1)
    seed: int = key(0, "Of the generator.", low=0, high=2**31 - 1)
    operations: str = key("+-*", "Which of + - * occur.")
    min_steps: int = key(2, "Fewest operations in an expression.", low=1)
    max_steps: int = key(4, "Most operations in an expression.", low=1)
    max_operand: int = key(9, "Literals are 1 to this.", low=1)
    max_value: int = key(99, "Bound of every intermediate value.", low=1)

    @property
    def spec(self) -> ArithmeticSpec:
        """Which expressions exist."""
        return ArithmeticSpec(
            operations=self.operations,
            min_steps=self.min_steps,
            max_steps=self.max_steps,
            max_operand=self.max_operand,
            max_value=self.max_value,
        )

    def prepare(self, data_dir: Path, split: Split) -> Prepared:
        """Generated problems, each once; DataError where fewer exist."""
        return self._prepare("arithmetic", data_dir, split, self.train, self.test, lambda item: [_problem(item)])

    def preferences(self, data_dir: Path, split: Split, *, train: int, validation: int) -> Prepared:
        """The right worked answer over a corrupted one."""

        def make(item: Item) -> Sequence[Mapping[str, Any]]:
            return [pair_record(item, seed=self.seed, max_value=self.max_value)]

        return self._prepare("preferences", data_dir, split, train, validation, make, corruption=CORRUPTION)

    def rankings(self, data_dir: Path, split: Split, *, train: int, validation: int, candidates: int) -> Prepared:
        """A right answer, then wrong ones, better the later they go wrong."""

        def make(item: Item) -> Sequence[Mapping[str, Any]]:
            return [ranking_record(item, seed=self.seed, max_value=self.max_value, candidates=candidates)]

        options = {"corruption": CORRUPTION, "candidates": candidates}
        return self._prepare("rankings", data_dir, split, train, validation, make, **options)

    def steps(self, data_dir: Path, split: Split, *, train: int, validation: int) -> Prepared:
        """Two records a problem: a right solution and a corrupted one."""

        def make(item: Item) -> Sequence[Mapping[str, Any]]:
            return step_records(item, seed=self.seed, max_value=self.max_value)

        return self._prepare("steps", data_dir, split, train, validation, make, corruption=CORRUPTION)

    def _prepare(
        self, kind: str, data_dir: Path, split: Split, train: int, validation: int, make: Make, **inputs: int
    ) -> Prepared:
        def load() -> Splits:
            items = split_items(train, validation, seed=self.seed, split=split, spec=self.spec)
            named = zip(("train", "validation"), items, strict=True)
            return {name: [Row(record) for item in part for record in make(item)] for name, part in named}

        sizes = {"train": train, "validation": validation, "seed": self.seed}
        made = {"generator": "arithmetic", "spec": asdict(self.spec), "split": asdict(split), **sizes, **inputs}
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


def _problem(item: Item) -> Mapping[str, Any]:
    return {
        "prompt": item.prompt,
        "completion": item.solution,
        "answer": item.answer,
        "kind": item.kind,
        "steps": list(item.steps),
        "difficulty": item.difficulty,
    }


PROVIDES = {"task": {"arithmetic": Arithmetic}}
