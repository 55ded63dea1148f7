"""Preference records in the common shapes as one `Preference`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from research.data.chat import Message, parse_messages, parse_turns
from research.errors import DataError

_SHAPES = "prompt+chosen+rejected, conversations+chosen+rejected, or chosen+rejected as whole conversations"


@dataclass(frozen=True)
class Preference:
    """Two assistant turns that answer one prompt, the better one first."""

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message


def parse_preference(record: Mapping[str, Any], *, where: str) -> Preference:
    """A pair from {prompt, chosen, rejected}, ShareGPT's {conversations, chosen, rejected}, or two whole
    conversations {chosen, rejected} that differ in their last turn.

    Strings, {role, content} and {from, value} objects and lists of them are all read.

    Raises:
        DataError: the shape is unknown, a side is not one assistant turn, or both sides are equal.
    """
    if not {"chosen", "rejected"} <= record.keys():
        raise DataError(f"{where}: found the keys {', '.join(record) or '(none)'}, expected {_SHAPES}.")
    chosen = parse_turns(record["chosen"], role="assistant", where=f"{where}: chosen")
    rejected = parse_turns(record["rejected"], role="assistant", where=f"{where}: rejected")
    prompt: tuple[Message, ...]
    if "prompt" in record:
        prompt = parse_turns(record["prompt"], role="user", where=f"{where}: prompt")
    elif "conversations" in record:
        prompt = parse_messages(record["conversations"], where=f"{where}: conversations")
    else:
        prompt = ()
    # Some sets repeat the prompt inside both sides; strip what is shared.
    if len(chosen) > 1 or len(rejected) > 1:
        if chosen[:-1] != rejected[:-1] or (prompt and chosen[:-1] != prompt):
            raise DataError(f"{where}: chosen and rejected do not continue the same prompt.")
        prompt = chosen[:-1]
    if not prompt:
        raise DataError(f"{where}: has no prompt, expected {_SHAPES}.")
    for side, message in (("chosen", chosen[-1]), ("rejected", rejected[-1])):
        if message.role != "assistant":
            raise DataError(f"{where}: {side} ends with a {message.role} turn, expected an assistant turn.")
    if prompt[-1].role == "assistant":
        raise DataError(f"{where}: the prompt ends with an assistant turn, expected a user or tool turn.")
    if chosen[-1] == rejected[-1]:
        raise DataError(f"{where}: chosen and rejected are equal, so the pair states no preference.")
    return Preference(prompt, chosen[-1], rejected[-1])
