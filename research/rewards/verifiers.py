"""Rewards that check an answer instead of guessing at it. Verifiers take any text and never raise on it."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from research.core.errors import ConfigError, DataError
from research.tasks.answers import MARK, extract_final_answer, matches

# (completion, answer) -> reward
Verifier = Callable[[str, str], float]

_LARGEST = float(np.finfo(np.float32).max)


def exact_answer(completion: str, answer: str) -> float:
    """1 if the completion's final answer equals `answer` (itself bare, or a solution ending in "#### N")."""
    return float(matches(completion, answer))


def final_line(completion: str, answer: str) -> float:  # noqa: ARG001 - every verifier has this signature
    """1 if the completion's last line is "#### " and an answer, right or wrong: a format reward.

    Gate it on correctness or weight it lightly: where correctness is rare, a bare format reward is what gets
    learned.
    """
    last = completion.rstrip().rpartition("\n")[2]
    return float(last.startswith(MARK) and extract_final_answer(last) is not None)


VERIFIERS: Mapping[str, Verifier] = MappingProxyType({"exact_answer": exact_answer, "final_line": final_line})


def get_verifier(name: str) -> Verifier:
    """The verifier of this name; ConfigError naming those that exist."""
    if name not in VERIFIERS:
        raise ConfigError(f"verifier: got {name!r}, expected one of {', '.join(sorted(VERIFIERS))}.")
    return VERIFIERS[name]


def score(completions: Sequence[str], answers: Sequence[str], verifier: Verifier) -> np.ndarray:
    """Rewards [B] float32 of completions against their answers.

    Raises:
        DataError: the counts differ, or a reward is NaN or infinite.
    """
    if len(completions) != len(answers):
        raise DataError(
            f"score: got {len(completions)} completions and {len(answers)} answers, expected as many."
        )
    rewards = np.empty(len(completions), np.float32)
    for index, (completion, answer) in enumerate(zip(completions, answers, strict=True)):
        reward = float(verifier(completion, answer))
        if not abs(reward) <= _LARGEST:  # false for NaN too
            name = getattr(verifier, "__name__", repr(verifier))
            raise DataError(
                f"prompt {index}: reward function {name} returned {reward}, expected a finite number."
            )
        rewards[index] = reward
    return rewards
