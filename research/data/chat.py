"""Conversations: the common record shapes as `Message`s, and `Message`s as tokens with a loss mask.

One turn is `<|im_start|>ROLE<|im_sep|>CONTENT<|im_end|>`; BOS stands once before the first turn. The loss
mask is 1 on what an assistant wrote and on the `<|im_end|>` that ends its turn, else 0.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np

from research.core.errors import DataError
from research.data import tokenizer as markup
from research.data.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant", "tool"]

# What the common data sets call the roles.
_ROLES: Mapping[str, Role] = {
    **{role: cast(Role, role) for role in get_args(Role)},
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "function": "tool",
}
_SHAPES = "prompt+completion, messages, question+answer or conversations"
_CALCULATOR = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Message:
    """One turn. `thinking` and `tool_calls` (JSON texts) belong to assistants and are rendered as markup."""

    role: Role
    content: str
    thinking: str = ""
    tool_calls: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rendered:
    """Tokens [T] int32 and loss mask [T] bool; `prompt_length` tokens precede the last assistant content."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    prompt_length: int


def normalize_record(
    record: Mapping[str, Any], *, where: str, strip_calculator: bool = True
) -> tuple[Message, ...]:
    """The messages of a record in any of the common shapes.

    Args:
        record: {prompt, completion} (strings or message lists), {messages: [{role, content}]}, GSM8K
            {question, answer} or ShareGPT {conversations: [{from, value}]}. Further keys are ignored.
        where: what an error message calls the record, such as "train.jsonl:12".
        strip_calculator: drop GSM8K's `<<48/2=24>>` marks from an answer.

    Raises:
        DataError: the shape is unknown, or a turn is malformed.
    """
    if "messages" in record:
        return parse_messages(record["messages"], where=f"{where}: messages")
    if "conversations" in record:
        return parse_messages(record["conversations"], where=f"{where}: conversations")
    if "prompt" in record and "completion" in record:
        prompt = parse_turns(record["prompt"], role="user", where=f"{where}: prompt")
        return prompt + parse_turns(record["completion"], role="assistant", where=f"{where}: completion")
    if "question" in record and "answer" in record:
        answer = _text(record["answer"], where=f"{where}: answer")
        if strip_calculator:
            answer = _CALCULATOR.sub("", answer)
        question = _text(record["question"], where=f"{where}: question")
        return Message("user", question), Message("assistant", answer)
    raise DataError(f"{where}: found the keys {', '.join(record) or '(none)'}, expected {_SHAPES}.")


def parse_turns(value: Any, *, role: Role, where: str) -> tuple[Message, ...]:
    """A string as one turn of `role`, a {role, content} or {from, value} object, or a list of those."""
    if isinstance(value, str):
        return (Message(role, _text(value, where=where)),)
    return parse_messages([value] if isinstance(value, Mapping) else value, where=where)


def parse_messages(value: Any, *, where: str) -> tuple[Message, ...]:
    """Messages from a list of {role, content} or {from, value} objects."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{where}: expected a list of at least one message, got {_short(value)}.")
    return tuple(_parse_message(turn, where=f"{where}[{index}]") for index, turn in enumerate(value))


def _parse_message(turn: Any, *, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where}: expected a message object, got {_short(turn)}.")
    keys = ("role", "content") if "role" in turn else ("from", "value")
    if not all(key in turn for key in keys):
        raise DataError(f"{where}: found the keys {', '.join(turn)}, expected role+content or from+value.")
    name = turn[keys[0]]
    if not isinstance(name, str) or name not in _ROLES:
        raise DataError(f"{where}: role is {_short(name)}, expected one of {', '.join(_ROLES)}.")
    role = _ROLES[name]
    calls = _calls(turn.get("tool_calls") or (), where=where)
    thinking = turn.get("thinking") or ""
    if not isinstance(thinking, str):
        raise DataError(f"{where}: thinking is {_short(thinking)}, expected text.")
    if role != "assistant" and (calls or thinking):
        raise DataError(
            f"{where}: a {role} turn has thinking or tool_calls, expected them on assistants only."
        )
    if calls and turn[keys[1]] in (None, ""):
        return Message(role, "", thinking, calls)
    return Message(role, _text(turn[keys[1]], where=where), thinking, calls)


def _calls(calls: Any, *, where: str) -> tuple[str, ...]:
    """Tool calls as texts: OpenAI's {function: {name, arguments}} becomes one sorted JSON object."""
    if not isinstance(calls, Sequence) or not all(isinstance(call, str | Mapping) for call in calls):
        raise DataError(f"{where}: tool_calls is {_short(calls)}, expected a list of texts or objects.")
    return tuple(
        call
        if isinstance(call, str)
        else json.dumps(call.get("function", call), ensure_ascii=False, sort_keys=True)
        for call in calls
    )


def _text(value: Any, *, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: expected non-empty text, got {_short(value)}.")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def split_response(messages: Sequence[Message], *, where: str) -> tuple[tuple[Message, ...], Message]:
    """The turns before the final assistant turn, and that turn."""
    if len(messages) < 2 or messages[-1].role != "assistant":
        last = messages[-1].role if messages else "nobody"
        raise DataError(
            f"{where}: the last of {len(messages)} turns is by {last}, "
            "expected a prompt and then an assistant turn."
        )
    return tuple(messages[:-1]), messages[-1]


def render_messages(
    messages: Sequence[Message], tokenizer: Tokenizer, *, where: str, train_on: Literal["all", "last"] = "all"
) -> Rendered:
    """A whole conversation, ending with an assistant turn, as tokens and loss mask.

    Args:
        messages: the turns.
        tokenizer: gives ids; contents can never produce markup.
        where: what an error message calls the record.
        train_on: "all" assistant turns carry loss, or the "last" one only.

    Raises:
        DataError: the last turn is not the assistant's, or the prompt is not a prefix of the whole.
    """
    prompt, _ = split_response(messages, where=where)
    tokens, mask = [tokenizer.bos_id], [False]
    for index, message in enumerate(messages):
        header = _header(message.role, tokenizer)
        content = [*_content(message, tokenizer), tokenizer.im_end_id]
        last = index == len(messages) - 1
        carries = last or (train_on == "all" and message.role == "assistant")
        tokens += header + content
        mask += [False] * len(header) + [carries] * len(content)
    start = render_prompt(prompt, tokenizer)
    if tokens[: len(start)] != start.tolist():
        raise DataError(f"{where}: the prompt's tokens are not a prefix of the prompt+completion tokens.")
    return Rendered(np.asarray(tokens, np.int32), np.asarray(mask, np.bool_), len(start))


def render_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> np.ndarray:
    """Tokens [T] int32 that ask for an assistant turn: they end with `<|im_start|>assistant<|im_sep|>`."""
    tokens = [tokenizer.bos_id, *render_turns(messages, tokenizer), *_header("assistant", tokenizer)]
    return np.asarray(tokens, np.int32)


def render_turns(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Whole turns as tokens, without BOS: what can be put between BOS and a prompt."""
    return tuple(
        token
        for message in messages
        for token in (*_header(message.role, tokenizer), *_content(message, tokenizer), tokenizer.im_end_id)
    )


def render_continuation(messages: Sequence[Message], tokenizer: Tokenizer) -> np.ndarray:
    """Tokens [T] int32 to append after a sampled assistant turn (whose `<|im_end|>` was sampled).

    They carry the new turns, such as a tool's result, and open the next assistant turn.
    """
    return render_prompt(messages, tokenizer)[1:]


def _header(role: Role, tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.im_start_id, *tokenizer.encode(role), tokenizer.im_sep_id]


def _content(message: Message, tokenizer: Tokenizer) -> list[int]:
    """Content ids; markup pieces come from the message's structure, never from its text."""
    if message.role == "tool":
        return _wrapped(message.content, markup.TOOL_RESULT, markup.END_TOOL_RESULT, tokenizer)
    ids = tokenizer.encode(message.content)
    if message.thinking:
        ids = _wrapped(message.thinking, markup.THINK, markup.END_THINK, tokenizer) + ids
    for call in message.tool_calls:
        ids += _wrapped(call, markup.TOOL_CALL, markup.END_TOOL_CALL, tokenizer)
    return ids


def _wrapped(text: str, opening: str, closing: str, tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.piece_id(opening), *tokenizer.encode(text), tokenizer.piece_id(closing)]
