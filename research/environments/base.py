"""What answers a policy between its turns: environments, and the tools that one of them offers."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from research.core.errors import ConfigError
from research.data.chat import Message


class ToolError(Exception):
    """Raised by a tool whose arguments make no sense to it; the message is fed back to the model."""


class ToolTimeout(ToolError):
    """Raised by a tool that ran out of its time."""


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    A component of kind "tool" is a `Tool`, or a class or function that gives one when it is called without arguments;
    the `key` fields of a class are its options.
    """

    name: str  # what a call says
    description: str  # one sentence for the system prompt
    parameters: Mapping[str, Any]  # JSON schema (2020-12) of the arguments, an object
    # arguments that fit the schema -> text. Equal arguments must give equal texts, and several threads may call it at
    # once. Raises `ToolError` for what the model can mend. It must end by itself: see `Toolbox`
    run: Callable[[Mapping[str, Any]], str]
    # what results depend on besides code and options, as JSON: the content of a file that is read
    version: Mapping[str, Any] = field(default_factory=dict)


def text_tool(
    name: str, description: str, argument: str, about: str, run: Callable[[str], str], **version: Any
) -> Tool:
    """A tool of one argument, a text, which `about` describes."""
    parameters = {
        "type": "object",
        "properties": {argument: {"type": "string", "description": about}},
        "required": [argument],
        "additionalProperties": False,
    }
    return Tool(name, description, parameters, lambda arguments: run(arguments[argument]), version)


def optional_package(name: str, user: str) -> ModuleType:
    """A package of the extra "tools"; ConfigError where it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{user}: the package {name} is missing; pip install 'temper[tools]'.") from error


class Completion(NamedTuple):
    """An assistant turn that has just ended."""

    text: str  # decoded, without markup
    tokens: tuple[int, ...]  # ids, without the end-of-turn token
    room: int  # tokens that the answer may take, turn headers included; 0 where the policy gets no further turn


class Turn(NamedTuple):
    """What an environment answers."""

    # appended before the policy's next turn; none, though not `done`, says that no answer fits
    messages: Sequence[Message] = ()
    done: bool = False  # the episode is over: the turn was the policy's last
    reward: float = 0.0  # for this turn; an episode's is the sum
    info: Mapping[str, float] = {}  # numbers for the log, `environment/<name>` is their mean over episodes
    # the tool calls of the turn: name ("" for no tool that exists), and "ok" or what went wrong
    calls: tuple[tuple[str, str], ...] = ()


class Environment(Protocol):
    """One episode: every completion that is sampled has an instance of its own.

    A component of kind "environment" is a class of these; the `key` fields of a dataclass are its options.
    """

    def reset(self, record: Mapping[str, Any], seed: int) -> list[Message]:
        """Begins an episode and gives its prompt, which must follow from the record (the task's row) and the seed."""

    def step(self, completion: Completion) -> Turn:
        """Answers a turn; called from several threads, for different episodes."""
