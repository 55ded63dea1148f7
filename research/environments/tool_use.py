"""The environment that offers tools."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from research.core.errors import ConfigError
from research.data.chat import Message, prompt_messages, render_continuation
from research.environments.base import Completion, Turn
from research.environments.calls import turn_calls
from research.environments.toolbox import Toolbox, too_many, tool_schema_text


class ToolUse:
    """Answers the calls of a turn with their results; a turn without calls ends the episode.

    Holds nothing of an episode, so that one instance serves all.

    Attributes:
      system: what the system turn of every prompt says of the tools.
    """

    def __init__(self, toolbox: Toolbox, *, max_calls: int = 4) -> None:
        """Binds the tools.

        Args:
          toolbox: runs the calls.
          max_calls: further calls of a turn are answered by an error.

        Raises:
          ConfigError: `max_calls` is out of range.
        """
        if max_calls < 1:
            raise ConfigError(f"tools.max_calls: got {max_calls}, expected >= 1")
        self.toolbox, self.max_calls = toolbox, max_calls
        self.system = tool_schema_text(tuple(toolbox.tools.values()))

    def reset(self, record: Mapping[str, Any], seed: int) -> list[Message]:
        """The record's prompt with the tools in its system turn."""
        del seed
        return self.described(prompt_messages(record, where="problem"))

    def described(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with the tools' descriptions in their system turn."""
        first, *rest = messages
        if first.role != "system":
            return [Message("system", self.system), *messages]
        if self.system not in first.content:  # a record may hold it already
            first = dataclasses.replace(first, content=f"{first.content}\n\n{self.system}")
        return [first, *rest]

    def step(self, completion: Completion) -> Turn:
        """Runs the turn's calls; none is run where no result of them all would fit."""
        tokenizer = self.toolbox.tokenizer
        calls = turn_calls(completion.tokens, tokenizer)
        if not calls:
            return Turn(done=True)
        frame = len(render_continuation([Message("tool", "")] * len(calls), tokenizer))
        each = min((completion.room - frame) // len(calls), self.toolbox.max_result_tokens)
        if each < self.toolbox.min_result_tokens:
            return Turn()
        results = [self.toolbox.run(call, max_tokens=each) for call in calls[: self.max_calls]]
        results += [self.toolbox.clipped(too_many(self.max_calls), each)] * (len(calls) - len(results))
        return Turn(
            messages=[Message("tool", result.text) for result in results],
            calls=tuple((result.tool, result.error or "ok") for result in results),
        )
