"""The tools of an experiment: their description in prompts, and the driver that runs the calls of rows."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from research.config.bridge import old_tools
from research.config.tree import Tree
from research.core.errors import ConfigError, DataError
from research.data.chat import Message
from research.data.examples import Records, prompt_messages
from research.data.store import file_hash
from research.data.tokenizer import Tokenizer
from research.environments.base import Toolbox, tool_schema_text
from research.environments.registry import make_tools
from research.environments.turns import RowTurns, TurnLimits, Turns
from research.tasks.sources import View

_CALLS_PER_TURN = 4
"""Further calls of one turn are answered by an error."""


class ToolUse:
    """The tools of an experiment, ready to run.

    Attributes:
      system: what the system turn of every prompt says of them.
      version: what results depend on, as JSON: the section's effective keys, the corpus by its content.
    """

    def __init__(self, tree: Tree, tokenizer: Tokenizer) -> None:
        """Makes the tools and reads the corpus, if any.

        Raises:
          ConfigError: a tool cannot run here, or the vocabulary cannot spell a call or the tools' descriptions.
          DataError: the corpus cannot be used.
        """
        section = old_tools(tree)
        tools = make_tools(
            section["names"],
            corpus=section["corpus"] or None,
            search_results=section["search_results"],
            isolation=section["isolation"],
        )
        self._toolbox = Toolbox(tools, tokenizer, max_result_tokens=section["max_result_tokens"])
        self._max_turns = section["max_turns"]
        self.system = tool_schema_text(tools)
        try:
            tokenizer.encode(self.system)
        except DataError as error:
            raise ConfigError(f"tools: the vocabulary cannot spell their descriptions ({error})") from error
        self.version: Tree = {**section, "names": list(section["names"])}
        if section["corpus"]:
            self.version["corpus"] = file_hash(Path(section["corpus"]))

    def prompts(self, problems: Records) -> Records:
        """The problems with the tools in the system turn of their prompts."""
        return View(problems, 0, self._told)

    def _told(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        messages = self.described(prompt_messages(record, where="problem"))
        return {**record, "prompt": [_record(message) for message in messages]}

    def described(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with the tools' descriptions in their system turn."""
        first, *rest = messages
        if first.role != "system":
            return [Message("system", self.system), *messages]
        if self.system not in first.content:  # a record may hold it already
            first = dataclasses.replace(first, content=f"{first.content}\n\n{self.system}")
        return [first, *rest]

    def turns(self, max_new_tokens: int) -> Turns:
        """Runs the calls of rows of at most so many tokens."""
        return Turns(self._toolbox, TurnLimits(self._max_turns, _CALLS_PER_TURN, max_new_tokens))


def tools_of(
    tree: Tree, tokenizer: Tokenizer, changes: Mapping[str, Any] = MappingProxyType({})
) -> ToolUse | None:
    """The tools of a stored experiment, None where it has none; `changes` replace keys of its section."""
    keys = {**tree["tools"], **changes}
    return ToolUse(keys, tokenizer) if keys["names"] else None


def was_cut(state: RowTurns) -> bool:
    """Whether a row ended with a call that nobody answered, as one that reached its limit of tokens does."""
    return state.finish in ("turn_limit", "no_room")


def _record(message: Message) -> dict[str, Any]:
    return {**dataclasses.asdict(message), "tool_calls": list(message.tool_calls)}
