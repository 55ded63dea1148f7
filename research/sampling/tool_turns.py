"""Tool turns in the engine: a row pauses at `<|im_end|>`, gets the results of its calls, and goes on.

Host side. `research/environments/turns.py` decides which results a row gets; here they become the engine's `Give`.
"""

from collections.abc import Mapping, Sequence

from research.data.chat import Message, render_continuation
from research.environments.turns import RowTurns, Turns
from research.sampling.engine import End, Give, Look, Row


class ToolLook:
    """A `Look` that answers the calls of rows which have ended a turn.

    Attributes:
      states: where each row stands, by its number.
    """

    def __init__(self, turns: Turns, first: Look = lambda _rows: {}) -> None:
        """Binds the driver.

        Args:
          turns: runs the tools.
          first: another `Look`, such as stop strings; rows that it says something of are not asked for calls.
        """
        self.turns, self.first = turns, first
        self.states: dict[int, RowTurns] = {}

    def __call__(self, rows: Sequence[Row]) -> Mapping[int, Give | End]:
        """Runs the calls of all rows that have drawn their end-of-turn token, at once."""
        said = dict(self.first(rows))
        paused = [row for row in rows if row.stopped and row.number not in said]
        asked = [
            (self.states.get(row.number, RowTurns()), row.tokens[: row.length].tolist()) for row in paused
        ]
        for row, advance in zip(paused, self.turns.step(asked), strict=True):
            self.states[row.number] = advance.state
            if advance.forced:
                said[row.number] = Give(advance.forced)
        return said


def most_given(turns: Turns) -> int:
    """Tokens that one `Give` has at most: `EngineSpec.give`."""
    calls, box = turns.limits.max_calls_per_turn, turns.toolbox
    frame = len(render_continuation([Message("tool", "")] * calls, box.tokenizer))
    return min(frame + calls * box.max_result_tokens, turns.limits.max_new_tokens)
