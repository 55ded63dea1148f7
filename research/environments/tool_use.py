"""Tools in rollouts and evaluations: what a prompt says of them, and who answers the rows that call one."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research.config.checks import Tree
from research.config.effects import effective_tools
from research.config.experiment import Tools
from research.core.errors import ConfigError, DataError
from research.data.chat import Message
from research.data.examples import Records, prompt_messages
from research.data.store import file_hash
from research.data.tokenizer import Tokenizer
from research.environments.base import Toolbox, tool_schema_text
from research.environments.registry import make_tools
from research.environments.turns import RowTurns, TurnLimits, Turns
from research.sampling.engine import End, Give, Row
from research.tasks.sources import View

_CALLS_PER_TURN = 4
"""Further calls of one turn are answered by an error."""


class ToolUse:
    """The tools of an experiment, ready to run.

    Attributes:
      system: what the system turn of every prompt says of them.
      version: what results depend on, as JSON: the section's effective keys, the corpus by its content.
    """

    def __init__(self, section: Tools, tokenizer: Tokenizer) -> None:
        """Makes the tools and reads the corpus, if any.

        Raises:
          ConfigError: a tool cannot run here, or the vocabulary cannot spell a call or the tools' descriptions.
          DataError: the corpus cannot be used.
        """
        tools = make_tools(
            section.names,
            corpus=section.corpus or None,
            search_results=section.search_results,
            isolation=section.isolation,
        )
        self._toolbox = Toolbox(tools, tokenizer, max_result_tokens=section.max_result_tokens)
        self._max_turns = section.max_turns
        self.system = tool_schema_text(tools)
        try:
            tokenizer.encode(self.system)
        except DataError as error:
            raise ConfigError(f"tools: the vocabulary cannot spell their descriptions ({error})") from error
        self.version: Tree = effective_tools(dataclasses.asdict(section))
        self.version["names"] = list(section.names)
        if section.corpus:
            self.version["corpus"] = file_hash(Path(section.corpus))

    def prompts(self, problems: Records) -> Records:
        """The problems with the tools in the system turn of their prompts."""
        return View(problems, 0, self._told)

    def _told(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        first, *rest = prompt_messages(record, where="problem")
        if first.role != "system":
            first, rest = Message("system", self.system), [first, *rest]
        elif self.system not in first.content:  # a record may say it itself
            first = dataclasses.replace(first, content=f"{first.content}\n\n{self.system}")
        return {**record, "prompt": [_record(message) for message in (first, *rest)]}

    def answers(self, rows: int, max_new_tokens: int) -> "Answers":
        """The host's say over one batch of rows, none of which has begun."""
        limits = TurnLimits(self._max_turns, _CALLS_PER_TURN, max_new_tokens)
        return Answers(Turns(self._toolbox, limits), rows)


def tools_of(tree: Tree, tokenizer: Tokenizer) -> ToolUse | None:
    """The tools of a stored experiment, None where it has none."""
    section = Tools(**{**tree["tools"], "names": tuple(tree["tools"]["names"])})
    return ToolUse(section, tokenizer) if section.names else None


class Answers:
    """An `engine.Look` that runs the calls of rows that have ended a turn and gives them the results.

    Attributes:
      states: where each row stands.
    """

    def __init__(self, turns: Turns, rows: int) -> None:
        """Nobody has called yet."""
        self.turns, self.states = turns, [RowTurns() for _ in range(rows)]

    def __call__(self, rows: Sequence[Row]) -> Mapping[int, Give | End]:
        """What is given to whom, by the rows' numbers."""
        # A row that stopped at another token than the end of a turn has left the conversation.
        ended = [row for row in rows if row.stopped and row.tokens[row.length - 1] == self.turns.stop_id]
        asked = [(self.states[row.number], row.tokens[: row.length].tolist()) for row in ended]
        said: dict[int, Give | End] = {}
        for row, advance in zip(ended, self.turns.step(asked), strict=True):
            self.states[row.number] = advance.state
            if advance.forced:
                said[row.number] = Give(advance.forced)
        return said


def was_cut(state: RowTurns) -> bool:
    """Whether a row ended with a call that nobody answered, as one that reached its limit of tokens does."""
    return state.finish in ("turn_limit", "no_room")


def _record(message: Message) -> dict[str, Any]:
    return {**dataclasses.asdict(message), "tool_calls": list(message.tool_calls)}
