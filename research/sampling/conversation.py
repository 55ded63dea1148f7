"""A conversation with a policy: its turns as the tokens that were really read and drawn, cut to the context."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from research.core.errors import ConfigError
from research.data import tokenizer as markup
from research.data.chat import Message, render_prompt, render_turns
from research.data.tokenizer import Tokenizer
from research.sampling.rows import Row
from research.sampling.streaming import TextGenerator


class Exchange(NamedTuple):
    """A user's turn and all that followed it: its tokens for later prompts, its messages for a transcript."""

    tokens: tuple[int, ...]
    messages: tuple[Message, ...]


class Conversation:
    """The turns so far; those of `exchanges` that no longer fit into the context, the first `dropped`, are kept too."""

    def __init__(self, generator: TextGenerator, system: str = "") -> None:
        """A conversation without turns."""
        self.generator = generator
        first = [Message("system", system)] if system else []
        self.system = generator.described([*first, Message("user", "")])[:-1]
        self.reset()

    def reset(self) -> None:
        """Forgets all turns but the system's."""
        self.exchanges: list[Exchange] = []
        self.dropped = 0

    def ask(self, text: str) -> np.ndarray:
        """The prompt `[T]` for the answer to a message; drops as many of the oldest exchanges as do not fit.

        Raises:
          ConfigError: the message does not fit even without the turns before it.
          DataError: the vocabulary cannot spell it.
        """
        tokenizer, limit = self.generator.tokenizer, self.generator.prompt_limit
        alone = render_prompt([*self.system, Message("user", text)], tokenizer)
        if alone.size > limit:
            system = " with the system turn" if self.system else ""
            raise ConfigError(
                f"message: has {alone.size} tokens{system}, expected at most {limit} because the context is "
                f"{self.generator.max_length} and max_new_tokens {self.generator.settings.max_new_tokens}"
            )
        while alone.size + sum(len(each.tokens) for each in self.exchanges[self.dropped :]) > limit:
            self.dropped += 1
        start = 1 + len(render_turns(self.system, tokenizer))  # BOS and the system turn
        past = [token for each in self.exchanges[self.dropped :] for token in each.tokens]
        return np.concatenate([alone[:start], np.asarray(past, np.int32), alone[start:]])

    def answered(self, text: str, row: Row) -> None:
        """Appends a message and its answer, which is closed where it was cut."""
        tokenizer, user = self.generator.tokenizer, Message("user", text)
        drawn = row.tokens[: row.length].tolist()
        if drawn and drawn[-1] in (tokenizer.im_end_id, tokenizer.eos_id):
            drawn.pop()
        drawn.append(tokenizer.im_end_id)
        asked = render_prompt([user], tokenizer)[1:].tolist()
        self.exchanges.append(Exchange((*asked, *drawn), (user, *completion_messages(drawn, tokenizer))))

    def record(self) -> dict[str, Any]:
        """The whole conversation as a record of messages, the form that training data have."""
        messages = [*self.system, *(message for each in self.exchanges for message in each.messages)]
        fields = [{**dataclasses.asdict(message), "tool_calls": list(message.tool_calls)} for message in messages]
        return {"messages": [{k: v for k, v in each.items() if v or k in ("role", "content")} for each in fields]}


def completion_messages(tokens: Sequence[int], tokenizer: Tokenizer) -> list[Message]:
    """The turns of a completion, the assistant's and those of tools between them, up to the last `<|im_end|>`."""
    found, role, start = [], "assistant", 0
    for place, token in enumerate(tokens):
        if token == tokenizer.im_sep_id and tokenizer.im_start_id in tokens[start:place]:
            opened = max(i for i in range(start, place) if tokens[i] == tokenizer.im_start_id) + 1
            role, start = tokenizer.decode(tokens[opened:place]), place + 1
        elif token == tokenizer.im_end_id:
            found.append(_message(role, tokens[start:place], tokenizer))
            start = place + 1
    return found


def _message(role: str, tokens: Sequence[int], tokenizer: Tokenizer) -> Message:
    if role == "tool":
        return Message("tool", tokenizer.decode(tokens))
    thinking, tokens = _cut(tokens, markup.THINK, markup.END_THINK, tokenizer)
    calls, tokens = _cut(tokens, markup.TOOL_CALL, markup.END_TOOL_CALL, tokenizer)
    return Message("assistant", tokenizer.decode(tokens), "".join(thinking), tuple(calls))


def _cut(tokens: Sequence[int], opening: str, closing: str, tokenizer: Tokenizer) -> tuple[list[str], list[int]]:
    """Texts between pairs of markup, and the tokens outside of them."""
    first, last = tokenizer.piece_id(opening), tokenizer.piece_id(closing)
    texts: list[str] = []
    rest = list(tokens)
    while first in rest and last in rest[(start := rest.index(first)) :]:
        end = rest.index(last, start)
        texts.append(tokenizer.decode(rest[start:end]))
        rest[start : end + 1] = []
    return texts, rest
