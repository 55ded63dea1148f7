"""Reward functions with short names: right answers, and formats. A completion that was cut gets 0 from all of them."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from research.rewards.base import RewardContext
from research.tasks.answers import MARK, Matcher, extract_final_answer, matches

Record = Mapping[str, Any]


def correct(completion: str, record: Record, context: RewardContext) -> float | None:
    """Whether the completion is right, as the task says."""
    return context.task.correct(completion, record) if context.stopped else 0.0


def exact(completion: str, record: Record, context: RewardContext) -> float | None:
    """1 if the answer behind "####" or in \\boxed{} is the task's; None where the task has none."""
    return _matched(completion, record, context, "mark")


def plain(completion: str, record: Record, context: RewardContext) -> float | None:
    """1 if the completion, or its last line, is the task's answer; None where the task has none."""
    return _matched(completion, record, context, "plain")


def normalized(completion: str, record: Record, context: RewardContext) -> float | None:
    """1 if the last number, or the last line without regard to case, is the task's answer; None without one."""
    return _matched(completion, record, context, "normalized")


def final_line(completion: str, record: Record, context: RewardContext) -> float:  # noqa: ARG001
    """1 if the last line is "#### " and an answer, right or wrong: a format.

    Where right answers are rare, a format alone is what gets learned: weight it lightly, or reward it only with a
    right answer (`reward.format_mode=gated`).
    """
    return float(context.stopped and has_final_line(completion))


def one_final_line(completion: str, record: Record, context: RewardContext) -> float:  # noqa: ARG001
    """`final_line`, and no other "####" anywhere."""
    return float(context.stopped and has_one_final_line(completion))


def environment(completion: str, record: Record, context: RewardContext) -> float | None:  # noqa: ARG001
    """The sum of the environment's rewards for the turns; None without an environment."""
    return None if context.turns is None else context.turns.reward


def has_final_line(text: str) -> bool:
    """Whether the last line is "#### " and an answer."""
    last = text.rstrip().rpartition("\n")[2]
    return last.startswith(MARK) and extract_final_answer(last) is not None


def has_one_final_line(text: str) -> bool:
    """Whether the last line is "#### " and an answer, and no other "####" is anywhere: no second guesses."""
    return text.count(MARK) == 1 and has_final_line(text)


FORMATS: Mapping[str, Callable[[str], bool]] = MappingProxyType(
    {"final_line": has_final_line, "one_final_line": has_one_final_line}
)

PROVIDES = {
    "reward": {
        "correct": correct,
        "exact": exact,
        "plain": plain,
        "normalized": normalized,
        "final_line": final_line,
        "one_final_line": one_final_line,
        "environment": environment,
    }
}


def _matched(completion: str, record: Record, context: RewardContext, how: Matcher) -> float | None:
    answer = context.task.answer(record)
    if not answer.strip():
        return None
    return float(context.stopped and matches(completion, answer, how))
