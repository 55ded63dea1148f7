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
from research.environments.toolbox import Toolbox
from research.environments.turns import Turns


@dataclasses.dataclass(frozen=True)
class Interaction:
    """Environments of an experiment, ready to run."""

    make: Callable[[], Environment]  # a new environment
    tokenizer: Tokenizer
    max_turns: int  # turns of a completion that are answered
    version: Mapping[str, Any]  # what the answers depend on, as JSON: sources, options, files by their content
    tools: Toolbox | None = None  # the environment that offers tools, if it is that

    def begin(self, record: Mapping[str, Any]) -> tuple[Environment, list[Message]]:
        """A new episode on a record, and what it begins with.

        The seed follows from the record: the prompt and the episodes of all its samples begin alike.
        """
        environment = self.make()
        content = json.dumps(record, sort_keys=True, default=str).encode()
        seed = int.from_bytes(hashlib.sha256(content).digest()[:4], "big") >> 1
        return environment, environment.reset(record, seed)

    def prompts(self, records: Records) -> Records:
        """The records with the prompts of their episodes."""

        def plain(message: Message) -> dict[str, Any]:
            return {**dataclasses.asdict(message), "tool_calls": list(message.tool_calls)}

        return first_records(records, 0, lambda record: {**record, "prompt": list(map(plain, self.begin(record)[1]))})

    def turns(self, max_new_tokens: int) -> Turns:
        """Advances the episodes of completions of at most so many tokens."""
        return Turns(self.tokenizer, max_turns=self.max_turns, max_new_tokens=max_new_tokens)


def make_interaction(
    tools: Sequence[str],
    options: Mapping[str, Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    max_turns: int,
    max_result_tokens: int,
    environment: str = "",
) -> Interaction | None:
    """The tools or the environment that a config names, by names or references; None for neither.

    `options` are of each of them, by its short name; `max_result_tokens` of one tool's result. ConfigError or DataError
    says what cannot be used here.
    """
    if not tools and not environment:
        return None

    def source(component: Component) -> dict[str, Any]:
        return {**options.get(component.name, {}), "name": component.name, "source": component.source}

    version: dict[str, Any] = {"max_turns": max_turns}
    if environment:
        if tools:
            raise ConfigError(
                f"tools.environment: got {environment!r} and the tools {', '.join(tools)}, expected one of them "
                "because an environment answers every turn"
            )
        own = find("environment", environment, "tools.environment")
        if not isinstance(own.target, type):
            raise ConfigError(f"tools.environment: {environment} is no class, expected one of environments")
        version["environment"] = source(own)
        return Interaction(lambda: own.make(options.get(own.name, {})), tokenizer, max_turns, version)
    components = [find("tool", name, "tools.names") for name in tools]
    ready = [_tool(each, options.get(each.name, {})) for each in components]
    box = Toolbox(ready, tokenizer, max_result_tokens=max_result_tokens)
    try:
        tokenizer.encode(box.system)
    except DataError as error:
        raise ConfigError(f"tools: the vocabulary cannot spell their descriptions ({error})") from error
    version["max_result_tokens"] = max_result_tokens
    version["tools"] = [{**source(each), **tool.version} for each, tool in zip(components, ready, strict=True)]
    return Interaction(lambda: box, tokenizer, max_turns, version, box)


def _tool(component: Component, options: Mapping[str, Any]) -> Tool:
    made = component.make(options)
    tool = made() if callable(made) else made
    if not isinstance(tool, Tool):
        raise ConfigError(
            f"tools.names: {component.reference} gives {type(tool).__name__}, expected a Tool "
            "(research/environments/base.py)"
        )
    return tool
