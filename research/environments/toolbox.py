"""Runs tool calls: whatever the model wrote, the answer is a text."""

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

from research.core.errors import ConfigError, DataError
from research.data.chat import tools_text
from research.data.tokenizer import Tokenizer
from research.environments.base import Tool, ToolError, ToolTimeout
from research.environments.calls import Call, CallError

ErrorKind = Literal["malformed", "unknown_tool", "arguments", "tool", "timeout", "exception", "too_many"]

_NAME = re.compile("[A-Za-z0-9_-]+")

TRUNCATED = "...[truncated]"
"""Stands at the end of a result that was cut."""
EMPTY = "(no output)"
"""What a tool that returns nothing is shown as: chat records have no empty turns."""


@dataclass(frozen=True)
class Result:
    """A tool's answer.

    Attributes:
      text: what the model reads; starts with "error: " where something went wrong.
      tool: the tool's name, or "" where the call names none that exists.
      error: None, or what went wrong. "exception" is a bug in the tool, the rest is the model's doing.
    """

    text: str
    tool: str
    error: ErrorKind | None = None

    @property
    def ok(self) -> bool:
        """Nothing went wrong."""
        return self.error is None


class Toolbox:
    """Runs calls by name. Nothing that a model can write makes `run` raise.

    Each call runs in a thread of its own. One that takes longer than `timeout_s` is answered for and left behind:
    Python cannot stop a thread, so a tool that may run away must bound itself, as `python` does with a process.
    """

    def __init__(
        self, tools: Sequence[Tool], tokenizer: Tokenizer, *, max_result_tokens: int, timeout_s: float = 300.0
    ) -> None:
        """Checks the tools.

        Args:
          tools: with different names.
          tokenizer: measures results.
          max_result_tokens: tokens of one result, markup not counted.
          timeout_s: seconds of wall time for one call; the last resort against a tool that hangs.

        Raises:
          ConfigError: no tools, two of one name or an odd one, a schema that is none, a limit too small, or a
            vocabulary that cannot spell a call.
        """
        names = [tool.name for tool in tools]
        if not tools or len(set(names)) < len(names):
            raise ConfigError(f"tools: got {', '.join(names) or 'none'}, expected tools of different names.")
        odd = [name for name in names if not _NAME.fullmatch(name)]
        if odd:
            raise ConfigError(f"tools: the name {odd[0]!r} has other characters than letters, digits, _ and -.")
        if timeout_s <= 0:
            raise ConfigError(f"tools: timeout_s: got {timeout_s}, expected > 0 seconds.")
        try:
            tokenizer.encode(f'{{"name": "{"".join(names)}", "arguments": {{}}}}')
        except DataError as error:
            raise ConfigError(f"tools: the vocabulary cannot spell a call ({error}).") from error
        self.tools = {tool.name: tool for tool in tools}
        self.tokenizer = tokenizer
        self.timeout_s = timeout_s
        self.min_result_tokens = max(1, len(tokenizer.encode(spellable(TRUNCATED, tokenizer))))
        self.max_result_tokens = max_result_tokens
        if max_result_tokens < self.min_result_tokens:
            raise ConfigError(
                f"tools: max_result_tokens: got {max_result_tokens}, expected >= {self.min_result_tokens}, "
                f"the tokens of {TRUNCATED!r}."
            )
        self._validators = {tool.name: _validator(tool) for tool in tools}

    def run(self, call: Call | CallError, *, max_tokens: int | None = None) -> Result:
        """The answer to one call, in at most `max_tokens` (or else `max_result_tokens`) tokens."""
        return self.clipped(self._run(call), self.max_result_tokens if max_tokens is None else max_tokens)

    def clipped(self, result: Result, max_tokens: int) -> Result:
        """A result whose text fits, and is not empty."""
        text = result.text if result.text.strip() else EMPTY
        limit = min(max_tokens, self.max_result_tokens)
        return replace(result, text=clip_text(text, self.tokenizer, limit))

    def _run(self, call: Call | CallError) -> Result:
        if isinstance(call, CallError):
            return _failed(call.text, "", "malformed")
        if call.name not in self.tools:
            return _failed(f"no tool {call.name!r}, expected one of {', '.join(self.tools)}", "", "unknown_tool")
        wrong = _misfit(call.arguments, self._validators[call.name])
        if wrong:
            return _failed(f"{call.name}: {wrong}", call.name, "arguments")
        return self._timed(self.tools[call.name], call.arguments)

    def _timed(self, tool: Tool, arguments: Mapping[str, Any]) -> Result:
        answers: list[Result] = []
        # A pool would wait for a thread that hangs when the interpreter exits; a daemon does not hold it up.
        thread = threading.Thread(target=lambda: answers.append(_answer(tool, arguments)), daemon=True)
        thread.start()
        thread.join(self.timeout_s)
        late = _failed(f"{tool.name}: took longer than {self.timeout_s:g} seconds", tool.name, "timeout")
        return answers[0] if answers else late


def _answer(tool: Tool, arguments: Mapping[str, Any]) -> Result:
    try:
        text = tool.run(arguments)
        if not isinstance(text, str):
            raise TypeError(f"the tool gave {type(text).__name__}, expected str")
        return Result(text, tool.name)
    except ToolTimeout as error:
        return _failed(f"{tool.name}: {error}", tool.name, "timeout")
    except ToolError as error:
        return _failed(f"{tool.name}: {error}", tool.name, "tool")
    except (Exception, SystemExit) as error:
        # A bug in a tool costs one result, is counted as "exception", and can be read in the samples.
        return _failed(f"{tool.name} failed: {type(error).__name__}: {error}", tool.name, "exception")


def _failed(text: str, tool: str, error: ErrorKind) -> Result:
    return Result(f"error: {text}", tool, error)


def too_many(limit: int) -> Result:
    """The answer to a call beyond a turn's limit, which is not run."""
    return _failed(f"not run: at most {limit} calls in one turn", "", "too_many")


def spellable(text: str, tokenizer: Tokenizer) -> str:
    """The text without the characters that the vocabulary lacks; all of it where there is byte fallback."""
    try:
        tokenizer.encode(text)
        return text
    except DataError:
        known = {character for character in set(text) if _encodes(character, tokenizer)}
        return "".join(character for character in text if character in known)


def _encodes(character: str, tokenizer: Tokenizer) -> bool:
    try:
        tokenizer.encode(character)
        return True
    except DataError:
        return False


def clip_text(text: str, tokenizer: Tokenizer, limit: int) -> str:
    """A text of at most `limit` tokens: its beginning and `TRUNCATED` where it is longer.

    `limit` is at least the tokens of the mark. Characters that the vocabulary lacks are dropped.
    """
    size = 8 * (limit + 1)  # characters; the tokenizer never sees the megabytes of which it could keep nothing
    tokens = tokenizer.encode(spellable(text[:size], tokenizer))
    while len(tokens) <= limit and size < len(text):
        size *= 2
        tokens = tokenizer.encode(spellable(text[:size], tokenizer))
    if len(tokens) <= limit:
        return spellable(text, tokenizer)
    mark = spellable(TRUNCATED, tokenizer)
    for kept in range(limit, -1, -1):
        decoder = tokenizer.stream()  # drops the half of a character that the cut may leave
        clipped = "".join(map(decoder.push, tokens[:kept])) + mark
        if len(tokenizer.encode(clipped)) <= limit:
            return clipped
    raise ValueError(f"clip_text: limit {limit} is less than the {len(tokenizer.encode(mark))} tokens of {mark!r}.")


def tool_schema_text(tools: Sequence[Tool]) -> str:
    """What the system prompt says about the tools; see `tools_text`."""
    return tools_text(
        [
            {
                "type": "function",
                "function": {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)},
            }
            for tool in tools
        ]
    )


def _jsonschema() -> ModuleType:
    try:
        import jsonschema
    except ModuleNotFoundError as error:
        raise ConfigError("tools: the package jsonschema is missing; pip install 'temper[tools]'.") from error
    return jsonschema


def _validator(tool: Tool) -> Any:
    jsonschema = _jsonschema()
    try:
        jsonschema.Draft202012Validator.check_schema(tool.parameters)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"tools: {tool.name}: parameters is not a JSON schema ({error.message}).") from error
    return jsonschema.Draft202012Validator(tool.parameters)


def _misfit(arguments: Mapping[str, Any], validator: Any) -> str:
    """What is wrong with the arguments, or ""."""
    errors = sorted(validator.iter_errors(arguments), key=lambda each: (str(each.json_path), each.message))
    if not errors:
        return ""
    message = errors[0].message  # begins with the value, which may be long, and ends with what is wrong
    if len(message) > 200:
        message = f"{message[:100]}...{message[-100:]}"
    return f"arguments{errors[0].json_path[1:]}: {message}"
