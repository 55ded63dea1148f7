"""Where a reasoning step ends, in text and in tokens, and records of steps with labels.

A step is a line that holds more than white space. This one definition serves the labels that a process reward
model is trained on, the scores read from a sampled solution, and step rewards in RL.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from research.config.schema import short
from research.core.errors import DataError
from research.data.chat import Message, parse_aligned, parse_list, parse_prompt, unknown_shape
from research.data.tokenizer import Tokenizer

_SHAPES = "prompt+steps+labels, or input+steps+mistake_index"


def step_split(text: str) -> list[str]:
    """The steps of a solution: its lines, blank ones left out."""
    return [line for line in text.split("\n") if line.strip()]


def step_end_mask(tokens: np.ndarray, tokenizer: Tokenizer, mask: np.ndarray | None = None) -> np.ndarray:
    """True at the last token of each step: the line break that ends it; the last step ends with the mask.

    Source: Lightman et al. 2023, Section 2.6 (one prediction after the last token of each step).

    Args:
        tokens: [..., T] int token ids.
        tokenizer: says which ids break a line and which ones show.
        mask: [..., T] bool, the solution's tokens; None takes all. A turn's `<|im_end|>` inside the mask is the
            end of a last step that no line break ended.

    Returns:
        [..., T] bool; as many True as `step_split` finds steps in the masked tokens' text.
    """
    tokens = np.asarray(tokens)
    mask = np.ones(tokens.shape, np.bool_) if mask is None else np.asarray(mask, np.bool_)
    if mask.shape != tokens.shape:
        raise ValueError(f"mask: got shape {mask.shape}, expected that of tokens, {tokens.shape}")
    if tokens.size == 0:
        return np.zeros(tokens.shape, np.bool_)
    breaks_of, shows_of = _table(tokenizer)
    length = tokens.shape[-1]
    flat_mask = mask.reshape(-1, length)
    breaks = breaks_of[tokens].reshape(-1, length) & flat_mask
    shows = shows_of[tokens].reshape(-1, length) & flat_mask
    ends = breaks.copy()
    rows = np.flatnonzero(flat_mask.any(axis=1))
    ends[rows, length - 1 - flat_mask[rows, ::-1].argmax(axis=1)] = True
    # A line is a step where something was shown since the line before it ended.
    shown = shows.cumsum(axis=1)
    before = np.maximum.accumulate(np.where(breaks, shown, 0), axis=1)
    before = np.concatenate([np.zeros((len(before), 1), before.dtype), before[:, :-1]], axis=1)
    return (ends & (shown > before)).reshape(tokens.shape)


def step_end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The token ids whose text holds a line break."""
    return tuple(int(token) for token in np.flatnonzero(_table(tokenizer)[0]))


@lru_cache(maxsize=8)
def _table(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """[V] bool each: the id's text holds a line break; it holds more than white space."""
    texts = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    return (
        np.array(["\n" in text for text in texts], np.bool_),
        np.array([bool(text.strip()) for text in texts], np.bool_),
    )


@dataclass(frozen=True)
class LabelledSteps:
    """A prompt and the steps of one solution; each label is the probability that the step is right.

    A step is one line; a label of None leaves its step in the solution, unlabelled.
    """

    prompt: tuple[Message, ...]
    steps: tuple[str, ...]
    labels: tuple[float | None, ...]

    @property
    def solution(self) -> str:
        """The steps, one a line."""
        return "\n".join(self.steps)


def parse_steps(record: Mapping[str, Any], *, where: str) -> LabelledSteps:
    """Steps with labels from {prompt, steps, labels} or BIG-Bench-Mistake's {input, steps, mistake_index}.

    Labels are 0, 1, true, false, a probability, or null for a step that nobody judged. With `mistake_index` the
    steps before it are right, that one and all after it are not; null says that all are right. Line breaks
    inside a step become spaces.

    Source: Tyen et al. 2023, Section 2 (mistake_index is that of the first logical error, counted from 0).

    Raises:
        DataError: the shape is unknown, a step is blank, or the labels do not match the steps.
    """
    if {"prompt", "steps", "labels"} <= record.keys():
        key = "prompt"
    elif {"input", "steps", "mistake_index"} <= record.keys():
        key = "input"
    else:
        raise unknown_shape(record, _SHAPES, where=where)
    prompt = parse_prompt(record, key=key, where=where)
    steps = parse_list(record["steps"], "one step", where=f"{where}: steps")
    for index, step in enumerate(steps):
        if not isinstance(step, str) or not step.strip():
            raise DataError(f"{where}: steps[{index}]: expected non-empty text, got {short(step)}.")
    lines = tuple(re.sub(r"\s*\n\s*", " ", step.strip("\n")) for step in steps)
    if key == "input":
        return LabelledSteps(prompt, lines, _labels_before(record["mistake_index"], len(steps), where=where))
    others = "steps, expected one label a step"
    given = enumerate(parse_aligned(record["labels"], "labels", len(steps), others, where=where))
    labels = tuple(_label(label, where=f"{where}: labels[{index}]") for index, label in given)
    if all(label is None for label in labels):
        raise DataError(f"{where}: labels: all {len(labels)} are null, expected at least one label.")
    return LabelledSteps(prompt, lines, labels)


def _label(label: Any, *, where: str) -> float | None:
    if label is None or (isinstance(label, float) and math.isnan(label)):  # null as it is stored
        return None
    if not isinstance(label, bool | int | float) or not 0 <= label <= 1:
        raise DataError(f"{where}: got {short(label)}, expected a number from 0 (wrong) to 1 (right), or null.")
    return float(label)


def _labels_before(mistake: Any, count: int, *, where: str) -> tuple[float, ...]:
    if mistake is None:
        return (1.0,) * count
    if not isinstance(mistake, int) or isinstance(mistake, bool) or not 0 <= mistake < count:
        raise DataError(
            f"{where}: mistake_index: got {short(mistake)}, expected null or an index from 0 to {count - 1} "
            f"because there are {count} steps."
        )
    return (1.0,) * mistake + (0.0,) * (count - mistake)
