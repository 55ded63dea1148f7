"""Tool calls as a model writes them: found in the tokens of an assistant turn, and read as JSON.

A call is one JSON object {"name": ..., "arguments": {...}} between the markup pieces `<tool_call>` and
`</tool_call>`, the shape of Hermes and Qwen (https://github.com/NousResearch/Hermes-Function-Calling). Where the
pieces stand in a turn, and what a result looks like, is said in `research/data/chat.py` alone.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from research.data import tokenizer as markup
from research.data.tokenizer import Tokenizer

_DEEPEST = 64  # lists and objects within each other


@dataclass(frozen=True)
class Call:
    """A well-formed call: whether the tool exists and takes these arguments is the `Toolbox`'s question."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class CallError:
    """What is wrong with a call, as a sentence for the model."""

    text: str


def parse_call(text: str) -> Call | CallError:
    """The call that a text between the markup pieces spells.

    `arguments` may also be a text that holds the object (OpenAI's shape, which chat records may have). NaN and
    infinities are no JSON. Never raises.
    """
    try:
        value = _loads(text)
        if not isinstance(value, dict):
            return CallError(f"the call is {_kind(value)}, expected a JSON object with name and arguments")
        if set(value) != {"name", "arguments"}:
            found = ", ".join(map(repr, value)) or "none"
            return CallError(f"the call has the keys {found}, expected 'name' and 'arguments'")
        name, arguments = value["name"], value["arguments"]
        if not isinstance(name, str) or not name:
            return CallError(f"the call's name is {_kind(name)}, expected the name of a tool")
        if isinstance(arguments, str):
            arguments = _loads(arguments)
    except json.JSONDecodeError as error:
        return CallError(f"the call is not valid JSON ({error.msg} at character {error.pos + 1})")
    except RecursionError:
        return CallError("the call is not valid JSON (nested too deeply)")
    except ValueError as error:
        return CallError(f"the call is not valid JSON ({error})")
    if not isinstance(arguments, dict):
        return CallError(f"the call's arguments are {_kind(arguments)}, expected a JSON object")
    return Call(name, arguments)


def turn_calls(tokens: Sequence[int], tokenizer: Tokenizer) -> tuple[Call | CallError, ...]:
    """The calls in an assistant turn, in order.

    Calls inside `<think>` are only thought. Markup that does not pair up is one error at the place of the call.

    Args:
      tokens: ids of the turn, after `<|im_sep|>` and before `<|im_end|>`.
    """
    opening, closing = tokenizer.piece_id(markup.TOOL_CALL), tokenizer.piece_id(markup.END_TOOL_CALL)
    think, end_think = tokenizer.piece_id(markup.THINK), tokenizer.piece_id(markup.END_THINK)
    others = frozenset(map(tokenizer.piece_id, markup.MARKUP)) - {closing}
    found: list[Call | CallError] = []
    start: int | None = None
    thinking = False
    for index, token in enumerate(tokens):
        if start is not None:
            if token == closing:
                found.append(parse_call(tokenizer.decode(tokens[start:index])))
                start = None
            elif token in others:
                found.append(CallError(f"found {tokenizer.pieces[token]} before the call's </tool_call>"))
                # A new opening starts the next call; anything else ends this one.
                start = index + 1 if token == opening else None
                thinking = token == think
        elif thinking or token == think:
            thinking = token != end_think
        elif token == opening:
            start = index + 1
        elif token == closing:
            found.append(CallError("found </tool_call> without <tool_call>"))
    if start is not None:
        found.append(CallError("the turn ended before the call's </tool_call>"))
    return tuple(found)


def _loads(text: str) -> Any:
    """JSON that can be encoded again; ValueError or RecursionError where it is none, or is nested too deeply."""
    value = json.loads(text, parse_constant=_not_finite, parse_float=_finite)
    # A fixed bound: where Python's own stack ends depends on the caller.
    level = [value]
    for _ in range(_DEEPEST):
        inner = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [child for children in inner for child in children]
    if level:
        raise RecursionError
    # "\ud800" is JSON, but no text: it could neither be encoded nor reach a tool.
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("a string is not valid Unicode") from error
    return value


def _not_finite(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    if math.isinf(float(text)):
        raise ValueError(f"the number {text[:40]} is too large")
    return float(text)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return "an empty text" if value == "" else kinds.get(type(value), "a number")
