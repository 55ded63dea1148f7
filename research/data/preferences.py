"""Preference records in the common shapes as a `Preference`, a `Ranking` or `Judged` completions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from research.config.schema import short
from research.core.errors import DataError
from research.data.chat import (
    Message,
    parse_aligned,
    parse_list,
    parse_messages,
    parse_prompt,
    parse_turns,
    to_answer,
    unknown_shape,
)

_SHAPES = "prompt+chosen+rejected, conversations+chosen+rejected, or chosen+rejected as whole conversations"
_PAIR = frozenset({"chosen", "rejected"})
_LARGEST = 3e38  # of float32


@dataclass(frozen=True)
class Preference:
    """Two assistant turns that answer one prompt, the better one first.

    Attributes:
        prompt: the turns before both.
        chosen, rejected: the two turns.
        margin: how much better the chosen one is rated (any unit; it is subtracted from a score difference).
        label_probability: probability that the chosen one is the better one.
    """

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    margin: float = 0.0
    label_probability: float = 1.0


@dataclass(frozen=True)
class Ranking:
    """Assistant turns that answer one prompt; `ranks` count from 0, the best, and equal ones are ties."""

    prompt: tuple[Message, ...]
    completions: tuple[Message, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Judged:
    """An assistant turn that answers a prompt, desirable or not."""

    prompt: tuple[Message, ...]
    completion: Message
    desirable: bool


def parse_preference(record: Mapping[str, Any], *, where: str) -> Preference:
    """A pair from {prompt, chosen, rejected}, ShareGPT's {conversations, chosen, rejected}, or two whole
    conversations {chosen, rejected} that differ in their last turn.

    Strings, {role, content} and {from, value} objects and lists of them are all read. `margin` and
    `label_probability` may stand beside them.

    Raises:
        DataError: the shape is unknown, a side is not one assistant turn, both sides are equal, the margin is
            no float32, or the probability is not one.
    """
    if not record.keys() >= _PAIR:
        raise unknown_shape(record, _SHAPES, where=where)
    chosen, rejected = (
        parse_turns(record[side], role="assistant", where=f"{where}: {side}") for side in ("chosen", "rejected")
    )
    prompt: tuple[Message, ...] = ()
    if "prompt" in record:
        prompt = parse_turns(record["prompt"], role="user", where=f"{where}: prompt")
    elif "conversations" in record:
        prompt = parse_messages(record["conversations"], where=f"{where}: conversations")
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
    prompt = to_answer(prompt, record, where=where)
    if chosen[-1] == rejected[-1]:
        raise DataError(f"{where}: chosen and rejected are equal, so the pair states no preference.")
    margin = _number(record.get("margin"), default=0.0, where=f"{where}: margin")
    probability = _number(record.get("label_probability"), default=1.0, where=f"{where}: label_probability")
    if not 0 <= probability <= 1:
        raise DataError(f"{where}: label_probability: got {probability}, expected a number from 0 to 1.")
    return Preference(prompt, chosen[-1], rejected[-1], margin, probability)


def parse_ranking(record: Mapping[str, Any], *, where: str) -> Ranking:
    """A ranking from {prompt, completions, ranks}; a preference pair is a ranking of two.

    Raises:
        DataError: the shape is unknown, the ranks do not match the completions, all are tied, or equal
            completions have different ranks.
    """
    if not {"prompt", "completions", "ranks"} <= record.keys():
        if record.keys() >= _PAIR:
            pair = parse_preference(record, where=where)
            return Ranking(pair.prompt, (pair.chosen, pair.rejected), (0, 1))
        raise unknown_shape(record, f"prompt+completions+ranks or {_SHAPES}", where=where)
    prompt = parse_prompt(record, where=where)
    texts = parse_list(record["completions"], "two", where=f"{where}: completions")
    ranks = parse_aligned(record["ranks"], "ranks", len(texts), "completions, expected one each", where=where)
    for index, rank in enumerate(ranks):
        if not isinstance(rank, int) or isinstance(rank, bool):
            raise DataError(f"{where}: ranks[{index}]: got {short(rank)}, expected an integer, lower is better.")
    if len(set(ranks)) == 1:
        raise DataError(f"{where}: ranks: all are {ranks[0]}, so the ranking states no preference.")
    completions = tuple(
        _parse_completion(text, where=f"{where}: completions[{index}]") for index, text in enumerate(texts)
    )
    rank_of: dict[Message, int] = {}
    for index, (message, rank) in enumerate(zip(completions, ranks, strict=True)):
        if rank_of.setdefault(message, rank) != rank:
            raise DataError(
                f"{where}: completions[{index}] equals an earlier one, but its rank is {rank} and not "
                f"{rank_of[message]}."
            )
    order = sorted(set(ranks))
    return Ranking(prompt, completions, tuple(order.index(rank) for rank in ranks))


def parse_judged(record: Mapping[str, Any], *, where: str) -> tuple[Judged, ...]:
    """Judged completions from {prompt, completion, label: bool} (one), or from a preference pair (two).

    Raises:
        DataError: the shape is unknown, or the label is not a boolean.
    """
    if not {"prompt", "completion", "label"} <= record.keys():
        if record.keys() >= _PAIR:
            pair = parse_preference(record, where=where)
            return Judged(pair.prompt, pair.chosen, True), Judged(pair.prompt, pair.rejected, False)
        raise unknown_shape(record, f"prompt+completion+label or {_SHAPES}", where=where)
    label = record["label"]
    if not isinstance(label, bool):
        raise DataError(f"{where}: label: got {short(label)}, expected true (desirable) or false.")
    prompt = parse_prompt(record, where=where)
    return (Judged(prompt, _parse_completion(record["completion"], where=f"{where}: completion"), label),)


def _parse_completion(value: Any, *, where: str) -> Message:
    turns = parse_turns(value, role="assistant", where=where)
    if len(turns) != 1 or turns[0].role != "assistant":
        roles = ", ".join(turn.role for turn in turns)
        raise DataError(f"{where}: found turns by {roles}, expected one assistant turn.")
    return turns[0]


def _number(value: Any, *, default: float, where: str) -> float:
    if value is None:
        return default
    # Compared before it is converted: an integer may be larger than any float.
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= _LARGEST:
        raise DataError(f"{where}: got {short(value)}, expected a number of at most {_LARGEST:g} either way.")
    return float(value)
