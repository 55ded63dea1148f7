"""What answers a policy while it is sampled, in rollouts and evaluations alike: an environment for each completion."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from research.config.references import Component, find
from research.core.errors import ConfigError, DataError
from research.data.chat import Message
from research.data.records import Records, first_records
from research.data.tokenizer import Tokenizer
from research.environments.base import Environment, Tool
from research.environments.tool_use import ToolUse
from research.environments.toolbox import Toolbox
from research.environments.turns import TurnLimits, Turns


@dataclasses.dataclass(frozen=True)
class Interaction:
    """Environments of an experiment, ready to run.

    Attributes:
      make: a new environment.
      tokenizer: reads turns and writes answers.
      max_turns: turns of a completion that are answered.
      version: what the answers depend on, as JSON: sources, options, files by their content.
      tools: the environment that offers tools, if it is that.
    """

    make: Callable[[], Environment]
    tokenizer: Tokenizer
    max_turns: int
    version: Mapping[str, Any]
    tools: ToolUse | None = None

    def begin(self, record: Mapping[str, Any]) -> Environment:
        """A new episode on a record."""
        return self._reset(record)[0]

    def prompt(self, record: Mapping[str, Any]) -> list[Message]:
        """What the episodes on a record begin with."""
        return self._reset(record)[1]

    def prompts(self, records: Records) -> Records:
        """The records with the prompts of their episodes."""
        return first_records(records, 0, lambda record: {**record, "prompt": [_plain(m) for m in self.prompt(record)]})

    def turns(self, max_new_tokens: int) -> Turns:
        """Advances the episodes of completions of at most so many tokens."""
        return Turns(TurnLimits(self.max_turns, max_new_tokens), self.tokenizer)

    def _reset(self, record: Mapping[str, Any]) -> tuple[Environment, list[Message]]:
        """The seed follows from the record: the prompt and the episodes of all its samples begin alike."""
        environment = self.make()
        content = json.dumps(record, sort_keys=True, default=str).encode()
        seed = int.from_bytes(hashlib.sha256(content).digest()[:4], "big") >> 1
        return environment, environment.reset(record, seed)


def make_interaction(
    tools: Sequence[str],
    options: Mapping[str, Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    max_turns: int,
    max_result_tokens: int,
    environment: str = "",
) -> Interaction | None:
    """The tools or the environment that a config names; None for neither.

    Args:
      tools: names or references.
      options: of each of them, by its short name.
      tokenizer: the policy's.
      max_turns: turns that are answered.
      max_result_tokens: of one tool's result.
      environment: name or reference, instead of tools.

    Raises:
      ConfigError: an unknown name, both, a tool that cannot run here, or that the vocabulary cannot spell.
      DataError: a file that a tool reads cannot be used.
    """
    if not tools and not environment:
        return None
    if environment:
        if tools:
            raise ConfigError(
                f"tools.environment: got {environment!r} and the tools {', '.join(tools)}, expected one of them "
                "because an environment answers every turn"
            )
        component = find("environment", environment, "tools.environment")
        if not isinstance(component.target, type):
            raise ConfigError(f"tools.environment: {environment} is no class, expected one of environments")
        own = options.get(component.name, {})
        version = {"max_turns": max_turns, "environment": _version(component, own)}
        return Interaction(lambda: component.make(own), tokenizer, max_turns, version)
    components = [find("tool", name, "tools.names") for name in tools]
    ready = [_tool(each, options.get(each.name, {})) for each in components]
    box = Toolbox(ready, tokenizer, max_result_tokens=max_result_tokens)
    answers = ToolUse(box)
    try:
        tokenizer.encode(answers.system)
    except DataError as error:
        raise ConfigError(f"tools: the vocabulary cannot spell their descriptions ({error})") from error
    version = {
        "max_turns": max_turns,
        "max_result_tokens": max_result_tokens,
        "tools": [
            {**_version(each, options.get(each.name, {})), **tool.version}
            for each, tool in zip(components, ready, strict=True)
        ],
    }
    return Interaction(lambda: answers, tokenizer, max_turns, version, answers)


def _tool(component: Component, options: Mapping[str, Any]) -> Tool:
    made = component.make(options)
    tool = made() if callable(made) else made
    if not isinstance(tool, Tool):
        raise ConfigError(
            f"tools.names: {component.reference} gives {type(tool).__name__}, expected a Tool "
            "(research/environments/base.py)"
        )
    return tool


def _version(component: Component, options: Mapping[str, Any]) -> dict[str, Any]:
    return {**options, "name": component.name, "source": component.source}


def _plain(message: Message) -> dict[str, Any]:
    return {**dataclasses.asdict(message), "tool_calls": list(message.tool_calls)}
