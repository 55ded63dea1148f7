"""The data of an experiment, opened once: text, problems, preferences, and the tokenizer made from them."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from research.config.tree import Tree
from research.core.errors import DataError
from research.data.builders import (
    ChatSpec,
    FileSpec,
    Prepared,
    TextSpec,
    prepare_arithmetic,
    prepare_arithmetic_preferences,
    prepare_arithmetic_rankings,
    prepare_arithmetic_steps,
    prepare_chat_sft,
    prepare_judged,
    prepare_preferences,
    prepare_rankings,
    prepare_steps,
    prepare_text_corpus,
)
from research.data.chat import normalize_record, split_response
from research.data.examples import Records, prompt_messages
from research.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from research.tasks.arithmetic.problems import ArithmeticSpec

_TOKENIZER_PROBLEMS = 2_000
"""Worked problems that the tokenizer sees: digits are single pieces anyway."""


@dataclasses.dataclass(frozen=True)
class View:
    """The first `limit` records of a source, each passed through a function."""

    source: Records
    limit: int
    change: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda record: record

    def __len__(self) -> int:
        return min(self.limit, len(self.source)) if self.limit else len(self.source)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self.change(self.source[index])

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for index in range(len(self)):
            yield self[index]


@dataclasses.dataclass(frozen=True)
class Sources:
    """Lazily prepared data: a stage pays only for what it reads.

    Attributes:
      section: the config's data section.
      data_dir: where prepared data sets and trained tokenizers live, shared by all runs of a workdir.
    """

    section: Tree
    data_dir: Path

    @cached_property
    def text(self) -> Prepared:
        """Raw documents {text}: train and validation."""
        text = self.section["text"]
        spec = TextSpec(
            path=text["path"] or None,
            max_bytes=text["max_bytes"] or None,
            validation_one_in=text["validation_one_in"],
        )
        return prepare_text_corpus(self.data_dir, spec)

    @cached_property
    def problems(self) -> Prepared:
        """Questions with worked answers: train and test (generated) or validation (a file)."""
        p = self.section["problems"]
        if p["kind"] == "jsonl":
            if not p["path"]:
                raise DataError("data.problems.path: got '', expected a JSONL file because kind is jsonl")
            return prepare_chat_sft(
                self.data_dir, ChatSpec(path=p["path"], validation_one_in=p["validation_one_in"])
            )
        return prepare_arithmetic(
            self.data_dir, n_train=p["train"], n_test=p["test"], seed=p["seed"], spec=self._arithmetic
        )

    @property
    def _arithmetic(self) -> ArithmeticSpec:
        p = self.section["problems"]
        keys = ("operations", "min_steps", "max_steps", "max_operand", "max_value")
        return ArithmeticSpec(**{key: p[key] for key in keys})

    @property
    def held_out(self) -> Records:
        """Problems that nothing trains on."""
        splits = self.problems.splits
        return splits["test"] if "test" in splits else splits["validation"]

    @cached_property
    def preferences(self) -> Prepared:
        """Pairs: train and validation."""
        if self.section["preferences"]["kind"] == "arithmetic":
            return prepare_arithmetic_preferences(self.data_dir, **self._generated("preferences"))
        path, one_in = self._file("preferences", "prompt, chosen, rejected")
        return prepare_preferences(self.data_dir, FileSpec(path=path, validation_one_in=one_in))

    @cached_property
    def unpaired(self) -> Prepared:
        """Completions that are each desirable or not: those of the pairs, or of a file that has labels."""
        if self.section["preferences"]["kind"] == "arithmetic":
            return self.preferences
        path, one_in = self._file("preferences", "prompt, completion, label (or pairs)")
        return prepare_judged(self.data_dir, FileSpec(path=path, validation_one_in=one_in))

    @cached_property
    def rankings(self) -> Prepared:
        """Ranked candidates: train and validation."""
        section = self.section["rankings"]
        if section["kind"] == "arithmetic":
            made = self._generated("rankings")
            return prepare_arithmetic_rankings(self.data_dir, candidates=section["candidates"], **made)
        path, one_in = self._file("rankings", "prompt, completions, ranks")
        return prepare_rankings(self.data_dir, FileSpec(path=path, validation_one_in=one_in))

    @cached_property
    def steps(self) -> Prepared:
        """Solutions with labelled steps: train and validation."""
        if self.section["steps"]["kind"] == "arithmetic":
            return prepare_arithmetic_steps(self.data_dir, **self._generated("steps"))
        path, one_in = self._file("steps", "prompt, steps, labels")
        return prepare_steps(self.data_dir, FileSpec(path=path, validation_one_in=one_in))

    def _generated(self, name: str) -> dict[str, Any]:
        """What judged data are generated from: problems of the experiment's own kind."""
        section, seed = self.section[name], self.section["problems"]["seed"]
        sizes = {"n_train": section["train"], "n_validation": section["validation"]}
        return {**sizes, "seed": seed, "spec": self._arithmetic}

    def _file(self, name: str, holds: str) -> tuple[str, int]:
        section = self.section[name]
        if not section["path"]:
            raise DataError(
                f"data.{name}.path: got '', expected a JSONL file of {holds} because kind is jsonl"
            )
        return section["path"], section["validation_one_in"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The given tokenizer, or one trained on this experiment's own corpus, kept by content."""
        t = self.section["tokenizer"]
        if t["path"]:
            return load_tokenizer(t["path"])
        parts = [t["model_type"], t["vocab_size"], self.text.version]
        if t["model_type"] != "char":
            parts.append(self.problems.version)
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        path = self.data_dir / "tokenizers" / f"{digest}.model"
        if path.exists():
            return load_tokenizer(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        return train_tokenizer(
            self._corpus(), vocab_size=t["vocab_size"] or None, path=path, model_type=t["model_type"],
            byte_fallback=t["model_type"] != "char",
        )  # fmt: skip

    def _corpus(self) -> Iterator[str]:
        for record in self.text.train:
            yield record["text"]
        if self.section["tokenizer"]["model_type"] == "char":
            return
        for index in range(min(_TOKENIZER_PROBLEMS, len(self.problems.train))):
            # The markup's role names are text; seen often, they become single pieces.
            yield f"system\nuser\nassistant\ntool\n{worked_text(self.problems.train[index])['text']}"

    def prepared(self, kind: str) -> Prepared:
        """The data of a kind: text, problems, preferences, unpaired, rankings, steps."""
        found: Mapping[str, Callable[[], Prepared]] = {
            "text": lambda: self.text,
            "problems": lambda: self.problems,
            "preferences": lambda: self.preferences,
            "unpaired": lambda: self.unpaired,
            "rankings": lambda: self.rankings,
            "steps": lambda: self.steps,
        }
        return found[kind]()

    def versions(self, kinds: tuple[str, ...]) -> dict[str, Any]:
        """What a run records of the data it reads: kind -> details with a content hash."""
        found = {kind: dict(self.prepared(kind).details) for kind in kinds}
        return {**found, "tokenizer": hashlib.sha256(self.tokenizer.model).hexdigest()}


def worked_text(record: Mapping[str, Any]) -> dict[str, str]:
    """A problem as plain text for pretraining: the question, then the worked answer."""
    messages = normalize_record(record, where="problem")
    return {"text": "\n".join(message.content for message in messages)}


def terse(fraction: float) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Leaves the steps out of this share of generated answers, chosen by content: only the final line stays.

    Demonstrations that mix worked and bare answers, as real ones do: a model fine-tuned on them does both. A scorer
    must know bare answers too, or it takes them for safe ones: of labelled steps {steps, labels} the last one stays
    with its label; each side of a pair {chosen, rejected} is drawn for itself (a pair stays whole that would have equal
    sides).
    """

    def drawn(content: str) -> bool:
        draw = int.from_bytes(hashlib.sha256(f"terse {content}".encode()).digest()[:8], "big") / 2**64
        return draw < fraction

    def bare(messages: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        *before, last = messages
        return [*before, {**last, "content": last["content"].splitlines()[-1]}]

    def change(record: Mapping[str, Any]) -> Mapping[str, Any]:
        if "chosen" in record:
            sides = ("chosen", "rejected")
            short = {key: bare(record[key]) for key in sides if drawn(f"{record['prompt']}{record[key]}")}
            changed = {**record, **short}
            return record if changed["chosen"] == changed["rejected"] else changed
        if "completion" in record:
            if not drawn(record["prompt"]):
                return record
            return {**record, "completion": record["completion"].splitlines()[-1]}
        if not drawn(f"{record['prompt']}{record['steps']}"):
            return record
        return {**record, "steps": record["steps"][-1:], "labels": record["labels"][-1:]}

    return change


def answer_of(record: Mapping[str, Any]) -> str:
    """What a verifier compares with: the record's answer, or its whole last turn where it has none."""
    answer = record.get("answer")
    if answer is not None and answer != "":
        return str(answer)
    return split_response(normalize_record(record, where="problem"), where="problem")[1].content


def question_of(record: Mapping[str, Any]) -> str:
    """The prompt as a person would read it."""
    return "\n".join(message.content for message in prompt_messages(record, where="problem"))
