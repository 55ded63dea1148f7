"""Tool turns of rows that are being sampled: what to do when a row has ended an assistant turn.

A row is stopped at `<|im_end|>`, the token that ends every turn. If the turn holds calls, the tools run, and the
tokens that `research/data/chat.py` renders for their results and for the opening of the next assistant turn are
handed back, to be fed to the model with completion mask False. Nothing here knows the sampler.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

from research.core.errors import ConfigError, DataError
from research.data.chat import Message, render_continuation
from research.environments.base import Result, Toolbox, too_many
from research.environments.calls import Call, CallError, turn_calls

Finish = Literal["answered", "turn_limit", "no_room"]


@dataclass(frozen=True)
class TurnLimits:
    """What one row may spend on tools.

    Attributes:
      max_turns: assistant turns with calls that are answered; a row that calls again ends.
      max_calls_per_turn: further calls of a turn are answered by an error.
      max_new_tokens: the row's budget; tokens of results count, since they take its slots.
      min_answer_tokens: are left of the budget after any result, or the row ends.
    """

    max_turns: int
    max_calls_per_turn: int
    max_new_tokens: int
    min_answer_tokens: int = 1

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for name in ("max_turns", "max_calls_per_turn", "max_new_tokens", "min_answer_tokens"):
            value = self.__dict__[name]
            if value < 1:
                raise ConfigError(f"tools: {name}: got {value}, expected >= 1.")
        if self.min_answer_tokens >= self.max_new_tokens:
            raise ConfigError(
                f"tools: min_answer_tokens: got {self.min_answer_tokens}, expected less than max_new_tokens "
                f"({self.max_new_tokens})."
            )


@dataclass(frozen=True)
class RowTurns:
    """Where a row stands.

    Attributes:
      turn_start: index in the row's completion at which its open assistant turn begins.
      turns: assistant turns whose calls were answered.
      forced_tokens: tokens handed back so far.
      calls: for each call answered, its tool ("" for none that exists) and "ok" or what went wrong.
      finish: why the row ended, None while it goes on.
    """

    turn_start: int = 0
    turns: int = 0
    forced_tokens: int = 0
    calls: tuple[tuple[str, str], ...] = ()
    finish: Finish | None = None

    def record(self) -> dict[str, Any]:
        """Plain JSON, for a checkpoint."""
        return {**self.__dict__, "calls": [list(call) for call in self.calls]}

    @staticmethod
    def restored(record: Mapping[str, Any]) -> "RowTurns":
        """The inverse of `record`."""
        return RowTurns(**{**record, "calls": tuple((tool, how) for tool, how in record["calls"])})


class Advance(NamedTuple):
    """What becomes of a row: goes on sampling (neither is set), is fed `forced` first, or ends.

    Attributes:
      state: the row's new state.
      forced: token ids to feed with completion mask False before sampling goes on.
      finish: "answered" for a turn without calls; "turn_limit" and "no_room" for calls that are not answered
        because there were enough, or because no result fits into what is left of the budget.
    """

    state: RowTurns
    forced: tuple[int, ...] = ()
    finish: Finish | None = None


class _Pending(NamedTuple):
    calls: tuple[Call | CallError, ...]
    max_tokens: int


class Turns:
    """Answers the calls of many rows: a pure function of their tokens, as far as the tools are."""

    def __init__(self, toolbox: Toolbox, limits: TurnLimits, *, workers: int = 8) -> None:
        """Binds tools and limits; `workers` calls run at once."""
        if workers < 1:
            raise ConfigError(f"tools: workers: got {workers}, expected >= 1.")
        self.toolbox, self.limits, self.workers = toolbox, limits, workers

    @property
    def stop_id(self) -> int:
        """The token at which the sampler must stop a row and ask."""
        return self.toolbox.tokenizer.im_end_id

    def step(self, rows: Sequence[tuple[RowTurns, Sequence[int]]]) -> list[Advance]:
        """What becomes of each row, in their order.

        Args:
          rows: each row's state and the ids of its completion so far, forced ones included. A row that has not
            ended its turn, or has not yet been fed what it was handed, goes on.

        Raises:
          ValueError: a row has tokens after the one that ended its turn, or had ended before.
        """
        plans = [self._plan(state, tokens) for state, tokens in rows]
        jobs = [
            (call if index < self.limits.max_calls_per_turn else None, plan.max_tokens)
            for plan in plans
            if isinstance(plan, _Pending)
            for index, call in enumerate(plan.calls)
        ]
        results = iter(self._run(jobs))
        return [
            plan
            if isinstance(plan, Advance)
            else self._answered(state, tokens, [next(results) for _ in plan.calls])
            for (state, tokens), plan in zip(rows, plans, strict=True)
        ]

    def _plan(self, state: RowTurns, tokens: Sequence[int]) -> Advance | _Pending:
        """Decides without running anything, so that no tool runs for nothing."""
        if state.finish is not None:
            raise ValueError(f"turns: the row has ended ({state.finish}), expected rows that go on.")
        turn = list(tokens[state.turn_start :])
        if self.stop_id not in turn:
            return Advance(state)
        after = len(turn) - 1 - turn.index(self.stop_id)
        if after:
            raise ValueError(
                f"turns: {after} tokens follow the end of a turn, expected the row to stop there."
            )
        calls = turn_calls(turn[:-1], self.toolbox.tokenizer)
        if not calls:
            return _finished(state, "answered")
        if state.turns == self.limits.max_turns:
            return _finished(state, "turn_limit")
        frame = len(self._rendered([""] * len(calls)))
        room = self.limits.max_new_tokens - len(tokens) - frame - self.limits.min_answer_tokens
        each = min(room // len(calls), self.toolbox.max_result_tokens)
        if each < self.toolbox.min_result_tokens:
            return _finished(state, "no_room")
        return _Pending(calls, each)

    def _run(self, jobs: Sequence[tuple[Call | CallError | None, int]]) -> list[Result]:
        def answer(job: tuple[Call | CallError | None, int]) -> Result:
            call, max_tokens = job
            if call is None:
                return self.toolbox.clipped(too_many(self.limits.max_calls_per_turn), max_tokens)
            return self.toolbox.run(call, max_tokens=max_tokens)

        if len(jobs) < 2 or self.workers == 1:
            return [answer(job) for job in jobs]
        with ThreadPoolExecutor(min(self.workers, len(jobs))) as pool:
            return list(pool.map(answer, jobs))  # in the order of the jobs, whichever ends first

    def _answered(self, state: RowTurns, tokens: Sequence[int], results: Sequence[Result]) -> Advance:
        forced = self._rendered([result.text for result in results])
        after = replace(
            state,
            turn_start=len(tokens) + len(forced),
            turns=state.turns + 1,
            forced_tokens=state.forced_tokens + len(forced),
            calls=(*state.calls, *((result.tool, result.error or "ok") for result in results)),
        )
        return Advance(after, forced)

    def _rendered(self, texts: Sequence[str]) -> tuple[int, ...]:
        messages = [Message("tool", text) for text in texts]
        return tuple(render_continuation(messages, self.toolbox.tokenizer).tolist())


def _finished(state: RowTurns, finish: Finish) -> Advance:
    return Advance(replace(state, finish=finish), (), finish)


def turn_metrics(rows: Sequence[RowTurns]) -> dict[str, float]:
    """Means and shares over rows, for the log.

    Returns: `tools/turns` and `tools/calls` a row, `tools/forced_tokens` a row, `tools/error_rate` of calls,
      `tools/NAME/calls` a row and `tools/NAME/error_rate` for each tool called ("none" where it does not exist),
      `tools/errors/KIND` calls in all, and `tools/frac_REASON` of rows for each reason to end.
    """
    if not rows:
        raise DataError("turn_metrics: got no rows, expected at least one.")
    calls = [call for row in rows for call in row.calls]
    errors = Counter(how for _, how in calls if how != "ok")
    found = {
        "tools/turns": sum(row.turns for row in rows) / len(rows),
        "tools/calls": len(calls) / len(rows),
        "tools/forced_tokens": sum(row.forced_tokens for row in rows) / len(rows),
        "tools/error_rate": sum(errors.values()) / max(1, len(calls)),
    }
    for name in sorted({tool for tool, _ in calls}):
        ends = [how for tool, how in calls if tool == name]
        found[f"tools/{name or 'none'}/calls"] = len(ends) / len(rows)
        found[f"tools/{name or 'none'}/error_rate"] = sum(how != "ok" for how in ends) / len(ends)
    found |= {f"tools/errors/{kind}": float(count) for kind, count in sorted(errors.items())}
    for reason in get_args(Finish):
        found[f"tools/frac_{reason}"] = sum(row.finish == reason for row in rows) / len(rows)
    return found
