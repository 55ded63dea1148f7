"""The environment that offers tools: whatever the model calls, the answer is a text."""

import dataclasses
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from research.config.schema import expect
from research.core.errors import ConfigError, DataError
from research.data.chat import Message, prompt_messages, render_continuation, tools_text
from research.data.tokenizer import Tokenizer
from research.environments.base import Completion, Tool, ToolError, ToolTimeout, Turn, optional_package
from research.environments.calls import Call, CallError, turn_calls

_MOST_CALLS = 4
"""Further calls of a turn are answered by an error."""
TRUNCATED = "...[truncated]"
"""Stands at the end of a result that was cut."""
EMPTY = "(no output)"
"""What a tool that returns nothing is shown as: chat records have no empty turns."""


class Result(NamedTuple):
    """A tool's answer."""

    text: str  # what the model reads; starts with "error: " where something went wrong
    tool: str  # the tool's name, or "" where the call names none that exists
    # "ok", or what went wrong: "malformed", "unknown_tool", "arguments", "tool", "timeout" and "too_many" are the
    # model's doing, "exception" is a bug in the tool
    how: str = "ok"


class Toolbox:
    """Answers the calls of a turn with their results; a turn without calls ends the episode.

    Holds nothing of an episode, so that one instance serves all. Nothing that a model can write makes it raise. Each
    call runs in a thread of its own. One that takes longer than `timeout_s` is answered for and left behind: Python
    cannot stop a thread, so a tool that may run away must bound itself, as `python` does with a process.
    """

    def __init__(
        self, tools: Sequence[Tool], tokenizer: Tokenizer, *, max_result_tokens: int, timeout_s: float = 300.0
    ) -> None:
        """Checks the tools.

        A result has at most `max_result_tokens`, markup not counted. `timeout_s` of wall time for one call is the last
        resort against a tool that hangs.
        """
        names = [tool.name for tool in tools]
        if len(set(names)) < len(names):
            raise ConfigError(f"tools: got {', '.join(names)}, expected tools of different names.")
        odd = [name for name in names if not re.fullmatch("[A-Za-z0-9_-]+", name)]
        if odd:
            raise ConfigError(f"tools: the name {odd[0]!r} has other characters than letters, digits, _ and -.")
        try:
            tokenizer.encode(f'{{"name": "{"".join(names)}", "arguments": {{}}}}')
        except DataError as error:
            raise ConfigError(f"tools: the vocabulary cannot spell a call ({error}).") from error
        self.tools, self.tokenizer = {tool.name: tool for tool in tools}, tokenizer
        self.timeout_s = timeout_s
        self.min_result_tokens = max(1, len(tokenizer.encode(spellable(TRUNCATED, tokenizer))))
        self.max_result_tokens = max_result_tokens
        least = f">= {self.min_result_tokens}, the tokens of {TRUNCATED!r}."
        expect(max_result_tokens >= self.min_result_tokens, "tools: max_result_tokens", max_result_tokens, least)
        self._validators = {tool.name: _validator(tool) for tool in tools}
        # What the system turn of every prompt says of the tools.
        described = [{key: getattr(tool, key) for key in ("name", "description", "parameters")} for tool in tools]
        self.system = tools_text([{"type": "function", "function": each} for each in described])

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
        calls = turn_calls(completion.tokens, self.tokenizer)
        if not calls:
            return Turn(done=True)
        frame = len(render_continuation([Message("tool", "")] * len(calls), self.tokenizer))
        each = min((completion.room - frame) // len(calls), self.max_result_tokens)
        if each < self.min_result_tokens:
            return Turn()
        results = [self.run(call, max_tokens=each) for call in calls[:_MOST_CALLS]]
        beyond = _failed(f"not run: at most {_MOST_CALLS} calls in one turn", "", "too_many")
        results += [self._clipped(beyond, each)] * (len(calls) - len(results))
        return Turn(
            messages=[Message("tool", result.text) for result in results],
            calls=tuple((result.tool, result.how) for result in results),
        )

    def run(self, call: Call | CallError, *, max_tokens: int | None = None) -> Result:
        """The answer to one call, in at most `max_tokens` (or else `max_result_tokens`) tokens."""
        return self._clipped(self._run(call), self.max_result_tokens if max_tokens is None else max_tokens)

    def _clipped(self, result: Result, max_tokens: int) -> Result:
        """A result whose text fits, and is not empty."""
        text = result.text if result.text.strip() else EMPTY
        return result._replace(text=clip_text(text, self.tokenizer, max_tokens))

    def _run(self, call: Call | CallError) -> Result:
        if isinstance(call, CallError):
            return _failed(call.text, "", "malformed")
        if call.name not in self.tools:
            return _failed(f"no tool {call.name!r}, expected one of {', '.join(self.tools)}", "", "unknown_tool")
        wrong = _misfit(call.arguments, self._validators[call.name])
        if wrong:
            return _failed(f"{call.name}: {wrong}", call.name, "arguments")
        answers: list[Result] = []
        tool = self.tools[call.name]
        # A pool would wait for a thread that hangs when the interpreter exits; a daemon does not hold it up.
        thread = threading.Thread(target=lambda: answers.append(_answer(tool, call.arguments)), daemon=True)
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
    except ToolError as error:
        return _failed(f"{tool.name}: {error}", tool.name, "timeout" if isinstance(error, ToolTimeout) else "tool")
    except (Exception, SystemExit) as error:
        # A bug in a tool costs one result, is counted as "exception", and can be read in the samples.
        return _failed(f"{tool.name} failed: {type(error).__name__}: {error}", tool.name, "exception")


def _failed(text: str, tool: str, how: str) -> Result:
    return Result(f"error: {text}", tool, how)


def spellable(text: str, tokenizer: Tokenizer) -> str:
    """The text without the characters that the vocabulary lacks; all of it where there is byte fallback."""

    def encodes(part: str) -> bool:
        try:
            tokenizer.encode(part)
            return True
        except DataError:
            return False

    if encodes(text):
        return text
    known = set(filter(encodes, set(text)))
    return "".join(character for character in text if character in known)


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
        spelled = b"".join(tokenizer.token_bytes[token] for token in tokens[:kept])
        clipped = spelled.decode(errors="ignore") + mark  # drops the half of a character that the cut may leave
        if len(tokenizer.encode(clipped)) <= limit:
            return clipped
    raise ValueError(f"clip_text: limit {limit} is less than the {len(tokenizer.encode(mark))} tokens of {mark!r}.")


def _validator(tool: Tool) -> Any:
    jsonschema = optional_package("jsonschema", "tools")
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
