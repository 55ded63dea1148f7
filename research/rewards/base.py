"""What a reward function is, and several of them, weighted, on a batch of completions."""

import math
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from research.core.errors import DataError
from research.data.chat import Message
from research.tasks.base import Task

_LARGEST = float(np.finfo(np.float32).max)
_SHOWN = 300
"""Characters of an exception's text that are kept."""


class Dialogue(NamedTuple):
    """What happened between the turns of a completion that tools or an environment answered."""

    text: str  # the whole completion with its markup: every turn, call and result
    # of each tool call, the tool ("" for none that exists), and "ok" or what went wrong
    calls: tuple[tuple[str, str], ...] = ()
    reward: float = 0.0  # sum of the environment's rewards for the turns


class RewardContext(NamedTuple):
    """What a reward function may know besides the completion and the record."""

    task: Task  # how the record is asked and checked
    prompt: tuple[Message, ...]  # the conversation before the completion
    length: int  # tokens that the policy drew, the stop token included
    stopped: bool  # False where the completion was cut at its limit
    seed: int  # for a function that draws random numbers; follows from the run's seed, iteration, prompt and sample
    turns: Dialogue | None = None  # None without tools or environment


class RewardFunction(Protocol):
    """A component of kind "reward": a function, or a frozen dataclass with `key` fields that is called like one."""

    def __call__(
        self, completion: str, record: Mapping[str, Any], context: RewardContext, /
    ) -> float | Mapping[str, float] | None:
        """The reward of one completion.

        Args:
          completion: its text after the last tool result, without markup: neither results nor earlier turns can be
            taken for an answer.
          record: the whole row of the data, every column.

        Returns:
          A number; or several by name, which are logged apart: "reward" among them is the reward, else it is their
          sum; or None where it cannot tell, as when it raises.
        """


class Sample(NamedTuple):
    """The arguments of a reward function for one completion, and the prompt's id for messages."""

    completion: str
    record: Mapping[str, Any]
    context: RewardContext
    prompt_id: int


class WeightedReward(NamedTuple):
    """One of several reward functions; one of weight 0 is logged and not learned from."""

    name: str
    function: RewardFunction
    weight: float = 1.0


class RewardError(NamedTuple):
    """A function that raised: on which prompt's completion, and the exception's type and text."""

    prompt_id: int
    name: str
    error: str


class Scores(NamedTuple):
    """Rewards of B completions."""

    rewards: np.ndarray  # `[B]` float32, the weighted sum
    known: np.ndarray  # `[B]` bool, whether all functions whose weight is not 0 could tell
    values: dict[str, np.ndarray]  # `[B]` float64 of each function, before weighting; NaN where it cannot tell
    # `[B]` float64 by "function/entry", of functions that return several numbers; NaN where absent
    entries: dict[str, np.ndarray]
    unknown: float  # what was paid for NaN
    errors: tuple[RewardError, ...]  # all that was raised

    def metrics(self) -> dict[str, float]:
        """Of each function mean and population std as paid, before weighting, and the share of unknown rewards."""
        found: dict[str, float] = {}
        for name, values in self.values.items():
            cannot = np.isnan(values)
            paid = np.where(cannot, self.unknown, values)
            each = {"mean": paid.mean(), "std": paid.std(), "unknown": cannot.mean()}
            found |= {f"reward/{name}/{what}": float(value) for what, value in each.items()}
        return found | {f"reward/{name}": float(np.nanmean(values)) for name, values in self.entries.items()}


def score(samples: Sequence[Sample], rewards: Sequence[WeightedReward], *, unknown: float = 0.0) -> Scores:
    """The weighted sum of K rewards of B completions, and each of them: `r_i = sum_k w_k r_ik`.

    A function that returns None, raises, or returns what is no number is worth `unknown`, before weighting. One that
    returns NaN or infinity is wrong and not unknown: DataError names function and prompt.
    """
    B = len(samples)
    values: dict[str, np.ndarray] = {}
    entries: dict[str, np.ndarray] = {}
    errors: list[RewardError] = []
    total, known = np.zeros(B, np.float64), np.ones(B, bool)
    for name, function, weight in rewards:
        values[name] = np.full(B, np.nan)
        for row, sample in enumerate(samples):
            try:
                value, parts = _numbers(function(sample.completion, sample.record, sample.context))
            except Exception as error:  # whatever it is: the function is the user's, the text a model's
                said = traceback.format_exception_only(error)[-1].strip()[:_SHOWN]
                errors.append(RewardError(sample.prompt_id, name, said))
                continue
            for entry, number in parts.items():
                entries.setdefault(f"{name}/{entry}", np.full(B, np.nan))[row] = _finite(name, sample, number)
            if value is not None:
                values[name][row] = _finite(name, sample, value)
        cannot = np.isnan(values[name])
        total += weight * np.where(cannot, unknown, values[name])
        known &= ~cannot | (weight == 0)
    return Scores(total.astype(np.float32), known, values, entries, unknown, tuple(errors))


def _numbers(returned: Any) -> tuple[float | None, dict[str, float]]:
    """What a function returned, as its reward and its named entries."""
    if isinstance(returned, Mapping):
        parts = {str(name): _number(value) for name, value in returned.items()}
        if not parts:
            return None, {}
        return (parts.pop("reward") if "reward" in parts else math.fsum(parts.values())), parts
    return (None if returned is None else _number(returned)), {}


def _number(value: Any) -> float:
    if isinstance(value, str | bytes):  # which float() would read
        raise TypeError(f"got the text {value!r}, expected a number")
    return float(value)


def _finite(name: str, sample: Sample, value: float) -> float:
    if not abs(value) <= _LARGEST:  # false for NaN too
        raise DataError(
            f"prompt {sample.prompt_id}: reward function {name} returned {value}, expected a finite number."
        )
    return value
