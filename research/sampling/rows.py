"""The engine's rows on the host: what was asked for, what was drawn so far, and what a callback may do about it."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from research.sampling.sampler import Chunk
from research.sampling.types import STOPPED, TRUNCATED

SHOWN = 80
"""Characters of a constraint or a text that a message quotes."""


@dataclasses.dataclass(frozen=True)
class Constraint:
    """What a completion, up to its stop token, must match as a whole."""

    kind: Literal["json_schema", "regex", "choice"]  # what `value` is
    # "json_schema": a schema as JSON text; its key `x-guidance` takes llguidance's options, such as
    # `{"whitespace_flexible": false}`. "regex": a pattern in the syntax of Rust's `regex`, without look-around.
    # "choice": the strings to choose from, as JSON text
    value: str

    def __str__(self) -> str:
        text = self.value.replace("\n", "\\n")
        return f"{self.kind} {text if len(text) <= SHOWN else text[:SHOWN] + ' ...'}"


def choice(options: Sequence[str]) -> Constraint:
    """A completion that is one of the options."""
    return Constraint("choice", json.dumps(options, ensure_ascii=False))


@dataclasses.dataclass(frozen=True)
class Request:
    """One completion to draw."""

    prompt: np.ndarray  # token ids, at least one
    prompt_id: int  # with `sample_id` it keys the randomness
    sample_id: int  # which of the prompt's completions
    max_new_tokens: int  # at least 1
    constraint: Constraint | None = None  # what the completion must match; None is free

    @property
    def key(self) -> bytes:
        """Equal prompts have equal keys."""
        return self.prompt.tobytes()

    def __str__(self) -> str:
        return f"prompt {self.prompt_id}, sample {self.sample_id}"


class Row:
    """A request and its completion so far: the first `length` entries of each array."""

    def __init__(self, number: int, request: Request) -> None:
        """A completion of no tokens; `number` is the request's, in the order given."""
        N = request.max_new_tokens
        self.number, self.request, self.length = number, request, 0
        self.matcher: Any = None  # follows its constraint (`Grammars.matcher`); None without, or when it has ended
        self.stopped = False  # its last token was a stop token that the model drew
        self.tokens, self.mask = np.zeros(N, np.int32), np.zeros(N, bool)  # the mask is False on forced tokens
        self.sampler_logps, self.policy_logps = np.zeros(N, np.float32), np.zeros(N, np.float32)

    def extend(self, chunk: Chunk, slot: int) -> bool:
        """Appends a slot's tokens of a chunk on the host; returns whether there were any."""
        count = int(chunk.active[:, slot].sum())
        new = slice(self.length, self.length + count)
        self.tokens[new], self.mask[new] = chunk.tokens[:count, slot], chunk.drawn[:count, slot]
        self.sampler_logps[new] = chunk.sampler_logps[:count, slot] * self.mask[new]
        self.policy_logps[new] = chunk.policy_logps[:count, slot] * self.mask[new]
        self.length += count
        return count > 0

    @property
    def stop_reason(self) -> int:
        """STOPPED or TRUNCATED."""
        return STOPPED if self.stopped else TRUNCATED


@dataclasses.dataclass(frozen=True)
class ForceTokens:
    """Append these tokens, which the model reads but did not draw (a tool's result), and go on sampling."""

    tokens: Sequence[int]


@dataclasses.dataclass(frozen=True)
class StopRow:
    """End the row with its first `keep` tokens, as if the last of them had been a stop token."""

    keep: int


RowCallback = Callable[[Sequence[Row]], Mapping[int, ForceTokens | StopRow]]
"""Called after each chunk with the rows that have new tokens; returns actions by row number, none for the others."""
