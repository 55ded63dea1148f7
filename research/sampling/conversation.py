"""A conversation with a policy: its turns as the tokens that were really read and drawn, cut to the context."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from research.core.errors import ConfigError
from research.data import tokenizer as markup
from research.data.chat import Message, render_prompt, render_turns
from research.data.tokenizer import Tokenizer
from research.sampling.rows import Row
from research.sampling.streaming import TextGenerator


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A user's turn and all that followed it: its tokens for later prompts, its messages for a transcript."""

    tokens: tuple[int, ...]
    messages: tuple[Message, ...]


class Conversation:
    """The turns so far.

    Attributes:
      system: the system turn, tools included; empty without both.
      exchanges: finished ones, oldest first; those that no longer fit into the context too.
      dropped: how many of the first exchanges are left out of prompts.
    """

    def __init__(self, generator: TextGenerator, system: str = "") -> None:
        """A conversation without turns."""
        self.generator = generator
        first = [Message("system", system)] if system else []
        user = Message("user", "")
        self.system = tuple(message for message in generator.described([*first, user]) if message is not user)
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
        tokenizer = self.generator.tokenizer
        drawn = row.tokens[: row.length].tolist()
        if drawn and drawn[-1] in (tokenizer.im_end_id, tokenizer.eos_id):
            drawn.pop()
        drawn.append(tokenizer.im_end_id)
        user = Message("user", text)
        asked = render_prompt([user], tokenizer)[1:].tolist()
        messages = (user, *completion_messages(drawn, tokenizer))
        self.exchanges.append(Exchange((*asked, *drawn), messages))

    def record(self) -> dict[str, Any]:
        """The whole conversation as a record of messages, the form that training data have."""
        messages = [*self.system, *(message for each in self.exchanges for message in each.messages)]
        return {"messages": [_json(message) for message in messages]}


def completion_messages(tokens: Sequence[int], tokenizer: Tokenizer) -> list[Message]:
    """The turns of a completion: the assistant's, and those of tools between them.

    Args:
      tokens: what followed the prompt, up to the last turn's `<|im_end|>`.
      tokenizer: of the tokens.
    """
    found, role, start = [], "assistant", 0
    for place, token in enumerate(tokens):
        if token == tokenizer.im_sep_id and tokenizer.im_start_id in tokens[start:place]:
            opened = place - list(reversed(tokens[start:place])).index(tokenizer.im_start_id)
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
    while first in rest and last in rest[rest.index(first) :]:
        start = rest.index(first)
        end = rest.index(last, start)
        texts.append(tokenizer.decode(rest[start:end]))
        rest[start : end + 1] = []
    return texts, rest


def _json(message: Message) -> dict[str, Any]:
    """A message without what it does not have."""
    fields = {**dataclasses.asdict(message), "tool_calls": list(message.tool_calls)}
    return {name: value for name, value in fields.items() if value or name in ("role", "content")}
