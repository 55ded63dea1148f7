"""Episodes of rows that are being sampled: what to do when a row has ended an assistant turn.

A row is stopped at `<|im_end|>`, the token that ends every turn. Its environment answers, and the tokens that
`research/data/chat.py` renders for the answer and for the opening of the next assistant turn are handed back, to be
fed to the model with completion mask False. Nothing here knows the sampler.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, get_args

from research.data.chat import render_continuation
from research.data.tokenizer import Tokenizer
from research.environments.base import Completion, Environment, Turn

Finish = Literal["answered", "turn_limit", "no_room"]


@dataclass(frozen=True)
class RowTurns:
    """Where a row stands."""

    turn_start: int = 0  # index in the row's completion at which its open assistant turn begins
    turns: int = 0  # assistant turns that were answered
    forced_tokens: int = 0  # tokens handed back so far
    # of each tool call, its tool ("" for none that exists) and "ok" or what went wrong
    calls: tuple[tuple[str, str], ...] = ()
    reward: float = 0.0  # sum of the environment's rewards
    info: Mapping[str, float] = field(default_factory=dict)  # sums of its numbers
    # why the row ended, None while it goes on: its environment was done ("answered"), or was not and there were enough
    # turns, or no room for its answer
    finish: Finish | None = None

    @property
    def cut(self) -> bool:
        """Whether it ended with a turn that nobody answered, as one that reached its limit of tokens does."""
        return self.finish in ("turn_limit", "no_room")


class Advance(NamedTuple):
    """What becomes of a row: ends (`state.finish`), is fed `forced` before it goes on, or just goes on."""

    state: RowTurns
    forced: tuple[int, ...] = ()


Episode = tuple[Environment, RowTurns, Sequence[int]]
"""An environment, where its row stands, and the ids of the row's completion so far, forced ones included."""


@dataclass(frozen=True)
class Turns:
    """Advances the episodes of many rows: a pure function of their tokens, as far as the environments are."""

    tokenizer: Tokenizer
    max_turns: int  # assistant turns that are answered; a row that needs another answer ends
    max_new_tokens: int  # of the whole row, all its turns and the answers to them
    workers: int = 8  # environments that answer at once

    @property
    def stop_id(self) -> int:
        """The token at which the sampler must stop a row and ask."""
        return self.tokenizer.im_end_id

    def step(self, episodes: Sequence[Episode]) -> list[Advance]:
        """What becomes of each row, none of which has ended, in their order.

        A row that has not ended its turn, or has not yet been fed what it was handed, goes on.
        """
        ended = [self._ended(state, tokens) for _, state, tokens in episodes]
        asked = [(env, said) for (env, *_), said in zip(episodes, ended, strict=True) if said is not None]
        if len(asked) < 2 or self.workers == 1:
            answers = [env.step(said) for env, said in asked]
        else:
            with ThreadPoolExecutor(min(self.workers, len(asked))) as pool:
                answers = list(pool.map(lambda pair: pair[0].step(pair[1]), asked))  # in the order of the rows
        left = iter(answers)
        return [
            Advance(state) if said is None else self._advance(state, len(tokens), said.room, next(left))
            for (_, state, tokens), said in zip(episodes, ended, strict=True)
        ]

    def _ended(self, state: RowTurns, tokens: Sequence[int]) -> Completion | None:
        """The row's open turn, where it has ended."""
        turn = tuple(int(token) for token in tokens[state.turn_start :])
        if not turn or turn[-1] != self.stop_id:
            return None
        room = self.max_new_tokens - len(tokens) - 1 if state.turns < self.max_turns else 0  # a token to go on with
        return Completion(self.tokenizer.decode(turn[:-1]), turn[:-1], max(0, room))

    def _advance(self, state: RowTurns, length: int, room: int, turn: Turn) -> Advance:
        info = {**state.info, **{k: state.info.get(k, 0.0) + float(v) for k, v in turn.info.items()}}
        after = replace(state, calls=(*state.calls, *turn.calls), reward=state.reward + turn.reward, info=info)
        if turn.done:
            return Advance(replace(after, finish="answered"))
        if state.turns == self.max_turns:
            return Advance(replace(after, finish="turn_limit"))
        forced = tuple(render_continuation(turn.messages, self.tokenizer).tolist()) if turn.messages else ()
        if not forced or len(forced) > room:
            return Advance(replace(after, finish="no_room"))
        after = replace(
            after,
            turn_start=length + len(forced),
            turns=state.turns + 1,
            forced_tokens=state.forced_tokens + len(forced),
        )
        return Advance(after, forced)


def turn_metrics(rows: Sequence[RowTurns]) -> dict[str, float]:
    """Means and shares over rows, at least one, for the log.

    `tools/error_rate` and `tools/NAME/error_rate` are of calls (NAME "none" where the tool does not exist),
    `tools/errors/KIND` calls in all, `tools/frac_REASON` of rows for each reason to end; all else is a row.
    """
    n = len(rows)
    calls = [call for row in rows for call in row.calls]
    errors = Counter(how for _, how in calls if how != "ok")
    found = {
        "tools/turns": sum(row.turns for row in rows) / n,
        "tools/calls": len(calls) / n,
        "tools/forced_tokens": sum(row.forced_tokens for row in rows) / n,
        "tools/error_rate": sum(errors.values()) / max(1, len(calls)),
    }
    for name in sorted({tool for tool, _ in calls}):
        ends = [how for tool, how in calls if tool == name]
        found[f"tools/{name or 'none'}/calls"] = len(ends) / n
        found[f"tools/{name or 'none'}/error_rate"] = sum(how != "ok" for how in ends) / len(ends)
    found |= {f"tools/errors/{kind}": float(count) for kind, count in sorted(errors.items())}
    found |= {f"tools/frac_{reason}": sum(row.finish == reason for row in rows) / n for reason in get_args(Finish)}
    if any(row.reward for row in rows):
        found["environment/reward"] = sum(row.reward for row in rows) / n
    for name in sorted({name for row in rows for name in row.info}):
        found[f"environment/{name}"] = sum(row.info.get(name, 0.0) for row in rows) / n
    return found
