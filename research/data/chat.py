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

from research.config.schema import short
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
_SHAPES = "prompt+completion, prompt+answer, messages, question+answer or conversations"
# GSM8K's <<48/2=24>> with the result behind it, in answers whose last line is "#### 24".
_CALCULATOR = re.compile(r"<<[-+*/().,%$=\d\s]*=[-+*/().,%$\d\s]*>>(?=[ $(]*[-+]?[\d.])")
_GSM8K_END = re.compile(r"(?:^|\n)####[ \t]*[-+$]*[\d.,]+[ \t]*\s*$")


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role, content: who says what.
        thinking, tool_calls: of assistants; rendered as markup. Calls are JSON texts.
        train: whether an assistant's turn carries loss where all turns do.
    """

    role: Role
    content: str
    thinking: str = ""
    tool_calls: tuple[str, ...] = ()
    train: bool = True

    @property
    def empty(self) -> bool:
        """Whether the turn says nothing at all."""
        return not (self.content.strip() or self.thinking.strip() or self.tool_calls)


@dataclass(frozen=True)
class Rendered:
    """Tokens [T] int32 and loss mask [T] bool; `prompt_length` tokens precede the last assistant content."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    prompt_length: int


def normalize_record(record: Mapping[str, Any], *, where: str) -> tuple[Message, ...]:
    """The messages of a record in any of the common shapes; turns may be empty (`Message.empty`).

    Args:
        record: {prompt, completion} (strings or message lists), {messages: [{role, content}]}, GSM8K's {question,
            answer}, ShareGPT's {conversations: [{from, value}]}, or {prompt, answer}, a prompt without a response.
            `system` and `tools` become its system turn. GSM8K's marks (`<<48/2=24>>`) are stripped from answers that
            end with its "#### 24". Further keys are ignored.
        where: what an error message calls the record, such as "train.jsonl:12".

    Raises:
        DataError: the shape is unknown, or a turn is malformed.
    """
    listed = next((key for key in ("messages", "conversations") if key in record), None)
    if listed is not None:
        messages = parse_messages(record[listed], where=f"{where}: {listed}")
    elif "prompt" in record and ("completion" in record or "answer" in record):
        messages = parse_turns(record["prompt"], role="user", where=f"{where}: prompt")
        if "completion" in record:
            messages += parse_turns(record["completion"], role="assistant", where=f"{where}: completion")
    elif "question" in record and "answer" in record:
        question, answer = (_text(record[key], where=f"{where}: {key}") for key in ("question", "answer"))
        if _GSM8K_END.search(answer):
            answer = _CALCULATOR.sub("", answer)
        messages = Message("user", question), Message("assistant", answer)
    else:
        raise unknown_shape(record, _SHAPES, where=where)
    return with_system(messages, record, where=where)


def prompt_messages(record: Mapping[str, Any], *, where: str) -> tuple[Message, ...]:
    """The turns that ask for an answer: a record's `prompt`, or what precedes its last assistant turn."""
    if "prompt" in record:
        turns = parse_turns(record["prompt"], role="user", where=f"{where}: prompt")
        prompt = with_system(turns, record, where=where)
    else:
        messages = normalize_record(record, where=where)
        prompt = messages[:-1] if messages[-1].role == "assistant" else messages
    if not prompt or prompt[-1].role == "assistant":
        raise DataError(f"{where}: the prompt is empty or ends with an assistant turn, expected a user turn.")
    return prompt


def parse_prompt(record: Mapping[str, Any], *, where: str, key: str = "prompt") -> tuple[Message, ...]:
    """The turns under a record's `key`, to which an assistant is to answer."""
    return to_answer(parse_turns(record[key], role="user", where=f"{where}: {key}"), record, where=where)


def to_answer(prompt: tuple[Message, ...], record: Mapping[str, Any], *, where: str) -> tuple[Message, ...]:
    """A prompt with its record's system turn; DataError where an assistant has the last word."""
    if prompt[-1].role == "assistant":
        raise DataError(f"{where}: the prompt ends with an assistant turn, expected a user or tool turn.")
    return with_system(prompt, record, where=where)


def unknown_shape(record: Mapping[str, Any], shapes: str, *, where: str) -> DataError:
    """For a record that has none of the shapes."""
    return DataError(f"{where}: found the keys {', '.join(record) or '(none)'}, expected {shapes}.")


def with_system(messages: tuple[Message, ...], record: Mapping[str, Any], *, where: str) -> tuple[Message, ...]:
    """The messages with what the record's `system` and `tools` say in their system turn.

    Raises:
        DataError: `system` is no text, or differs from the system turn; `tools` are no schemas.
    """
    system, schemas = record.get("system") or "", _schemas(record.get("tools"), where=where)
    if not isinstance(system, str):
        raise DataError(f"{where}: system: got {short(system)}, expected text.")
    first = messages[:1] if messages and messages[0].role == "system" else ()
    if first and system not in first[0].content:
        raise DataError(f"{where}: has both a system turn and another text under `system`, expected one.")
    said = first[0].content if first else system
    told = tools_text(schemas) if schemas else ""
    content = said if told in said else "\n\n".join(filter(None, (said, told)))
    return (Message("system", content), *messages[len(first) :]) if content else messages


def tools_text(schemas: Sequence[Mapping[str, Any]]) -> str:
    """What a system turn says about tools: one JSON object a line, as Qwen's and Hermes's templates do.

    Args:
        schemas: {"type": "function", "function": {name, description, parameters}} of each tool.
    """
    return "\n".join(
        (
            "You may call these tools:",
            *(json.dumps(schema, ensure_ascii=False) for schema in schemas),
            'A call is a JSON object {"name": ..., "arguments": {...}} between <tool_call> and </tool_call> at the '
            "end of your turn. Its result comes in the next turn.",
        )
    )


def _schemas(tools: Any, *, where: str) -> list[Mapping[str, Any]]:
    """The schemas under `tools`: a list, or one as JSON text."""
    try:
        parsed = (json.loads(tools) if isinstance(tools, str) and tools.strip() else tools) or []
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, list) or not all(isinstance(tool, Mapping) for tool in parsed):
        raise DataError(f"{where}: tools: got {short(tools)}, expected a list of tool schemas.")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in parsed]


def parse_turns(value: Any, *, role: Role, where: str) -> tuple[Message, ...]:
    """A string as one turn of `role`, a {role, content} or {from, value} object, or a list of those."""
    if isinstance(value, str):
        return (Message(role, value),)
    return parse_messages([value] if isinstance(value, Mapping) else value, where=where)


def parse_messages(value: Any, *, where: str) -> tuple[Message, ...]:
    """Messages from a list of {role, content} or {from, value} objects."""
    turns = enumerate(parse_list(value, "one message", where=where))
    return tuple(_parse_message(turn, where=f"{where}[{index}]") for index, turn in turns)


def parse_list(value: Any, least: Literal["one message", "one step", "two"], *, where: str) -> Sequence[Any]:
    """The value, if it is a list and has so many entries."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) < (2 if least == "two" else 1):
        raise DataError(f"{where}: expected a list of at least {least}, got {short(value)}.")
    return value


def parse_aligned(value: Any, name: str, count: int, others: str, *, where: str) -> Sequence[Any]:
    """The value, if it is a list with an entry for each of `count` others, which a phrase names."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count:
        found = f"{len(value)} {name}" if isinstance(value, list | tuple) else short(value)
        raise DataError(f"{where}: {name}: found {found} for {count} {others}.")
    return value


def _parse_message(turn: Any, *, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where}: expected a message object, got {short(turn)}.")
    keys = ("role", "content") if "role" in turn else ("from", "value")
    if not all(key in turn for key in keys):
        raise DataError(f"{where}: found the keys {', '.join(turn)}, expected role+content or from+value.")
    name, content = turn[keys[0]], turn[keys[1]]
    if not isinstance(name, str) or name not in _ROLES:
        raise DataError(f"{where}: role is {short(name)}, expected one of {', '.join(_ROLES)}.")
    role = _ROLES[name]
    calls = _calls(turn.get("tool_calls") or (), where=where)
    thinking = turn.get("thinking") or turn.get("reasoning_content") or ""
    if not isinstance(thinking, str):
        raise DataError(f"{where}: thinking is {short(thinking)}, expected text.")
    if role != "assistant" and (calls or thinking):
        raise DataError(f"{where}: a {role} turn has thinking or tool_calls, expected them on assistants only.")
    text = "" if content is None else _text(content, where=where)
    return Message(role, text, thinking, calls, _trains(turn, where=where))


def _trains(turn: Mapping[str, Any], *, where: str) -> bool:
    """`train` (true, false) or OpenAI's `weight` (0, 1); true where neither is given."""
    given = [turn[key] for key in ("train", "weight") if turn.get(key) is not None]
    for value in given:
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(f"{where}: train or weight is {short(value)}, expected 0 or 1.")
    return all(given)


def _calls(calls: Any, *, where: str) -> tuple[str, ...]:
    """Tool calls as texts: OpenAI's {function: {name, arguments}} becomes one sorted JSON object."""
    if not isinstance(calls, Sequence) or not all(isinstance(call, str | Mapping) for call in calls):
        raise DataError(f"{where}: tool_calls is {short(calls)}, expected a list of texts or objects.")
    return tuple(
        call if isinstance(call, str) else json.dumps(call.get("function", call), ensure_ascii=False, sort_keys=True)
        for call in calls
    )


def _text(value: Any, *, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: expected text, got {short(value)}.")
    return value


def before_response(messages: Sequence[Message], *, where: str) -> tuple[Message, ...]:
    """The turns before the final assistant turn; DataError where there is none, or nothing before it."""
    if len(messages) < 2 or messages[-1].role != "assistant":
        last = messages[-1].role if messages else "nobody"
        raise DataError(
            f"{where}: the last of {len(messages)} turns is by {last}, expected a prompt and then an assistant turn."
        )
    return tuple(messages[:-1])


def render_messages(
    messages: Sequence[Message], tokenizer: Tokenizer, *, where: str, train_on: Literal["all", "last"] = "all"
) -> Rendered:
    """A whole conversation, ending with an assistant turn, as tokens and loss mask; contents never produce markup.

    Args:
        messages: the turns.
        tokenizer: gives ids.
        where: what an error message calls the record.
        train_on: "all" assistant turns carry loss that do not say otherwise (`Message.train`), or the "last" one.

    Raises:
        DataError: the last turn is not the assistant's, or the prompt is not a prefix of the whole.
    """
    prompt = before_response(messages, where=where)
    tokens, mask = [tokenizer.bos_id], [False]
    for index, message in enumerate(messages):
        header = _header(message.role, tokenizer)
        content = [*_content(message, tokenizer), tokenizer.im_end_id]
        last = index == len(messages) - 1
        carries = last if train_on == "last" else message.role == "assistant" and message.train
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
