"""The one rule of an experiment for what is held out: a hash of the normalised prompt."""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from research.core.errors import DataError
from research.data.chat import Message

T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """One in `one_in` (at least 2) prompts is held out, whatever file, seed or count it comes from.

    The prompt's normalised text alone decides, so a prompt that is held out in one source is held out in all.
    """

    one_in: int

    def holds_out(self, prompt: str) -> bool:
        """Whether this prompt (text or `prompt_key`) is never trained on."""
        return _hash(prompt) % self.one_in == 0

    def divide(self, items: Sequence[T], prompts: Sequence[str], *, name: str) -> dict[str, list[T]]:
        """Items by the split that their prompts belong to.

        Raises:
            DataError: there are no items, or none is left for one of the splits.
        """
        if not items:
            raise DataError(f"{name}: holds no records, expected at least one.")
        splits: dict[str, list[T]] = {"train": [], "validation": []}
        for item, prompt in zip(items, prompts, strict=True):
            splits["validation" if self.holds_out(prompt) else "train"].append(item)
        for split, members in splits.items():
            if not members:
                raise DataError(
                    f"{name}: with data.validation_one_in={self.one_in} none of its {len(items)} records falls "
                    f"into the {split} split; {self._advice(prompts)}."
                )
        return splits

    def _advice(self, prompts: Sequence[str]) -> str:
        """The nearest value that leaves records in both splits."""
        hashes = {_hash(prompt) for prompt in prompts}
        for one_in in sorted(range(2, 1 + max(100, self.one_in)), key=lambda n: abs(n - self.one_in)):
            held = sum(value % one_in == 0 for value in hashes)
            if 0 < held < len(hashes):
                return f"{one_in} would hold out {held} of its {len(hashes)} prompts"
        return "it needs more prompts"


def normal_text(text: str) -> str:
    """Unicode NFKC, every run of white space one blank, none at the ends; case is kept."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def prompt_key(messages: Sequence[Message]) -> str:
    """The normalised text of a prompt, system turns left out: equal for prompts that differ in nothing else."""
    turns = ((message.content, *message.tool_calls) for message in messages if message.role != "system")
    return "\n".join(normal_text(" ".join(texts)) for texts in turns)


def answered_prompts(messages: Sequence[Message]) -> Iterator[str]:
    """The key of each prompt that a conversation answers: what stands before each assistant turn."""
    for index, message in enumerate(messages):
        if message.role == "assistant" and (key := prompt_key(messages[:index])):
            yield key


def _hash(prompt: str) -> int:
    return int.from_bytes(hashlib.sha256(normal_text(prompt).encode()).digest()[:8], "big")
