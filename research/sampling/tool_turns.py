"""Tool turns in the engine: a row pauses at `<|im_end|>`, is fed the results of its calls, and goes on.

Host side. `research/environments/turns.py` decides which results a row gets; here they become `ForceTokens`.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from research.data.chat import Message, render_continuation
from research.environments.turns import RowTurns, Turns
from research.sampling.rows import ForceTokens, Row, RowCallback, StopRow


class ToolCallback:
    """A `RowCallback` that runs the calls of rows which have ended a turn.

    Attributes:
      states: each row's turns so far, by its number.
    """

    def __init__(self, turns: Turns, first: RowCallback = lambda _rows: {}) -> None:
        """Binds the tools.

        Args:
          turns: runs the calls.
          first: another callback, such as stop strings; the calls of rows that it acts on are not run.
        """
        self.turns, self.first = turns, first
        self.states: defaultdict[int, RowTurns] = defaultdict(RowTurns)

    def __call__(self, rows: Sequence[Row]) -> Mapping[int, ForceTokens | StopRow]:
        """Runs the calls of all rows that have drawn their end-of-turn token, together."""
        actions = dict(self.first(rows))
        paused = [row for row in rows if row.stopped and row.number not in actions]
        asked = [(self.states[row.number], row.tokens[: row.length].tolist()) for row in paused]
        for row, advance in zip(paused, self.turns.step(asked), strict=True):
            self.states[row.number] = advance.state
            if advance.forced:
                actions[row.number] = ForceTokens(advance.forced)
        return actions


def most_forced(turns: Turns) -> int:
    """Tokens that the results of one turn have at most: `EngineSpec.max_forced`."""
    calls, box = turns.limits.max_calls_per_turn, turns.toolbox
    frame = len(render_continuation([Message("tool", "")] * calls, box.tokenizer))
    return min(frame + calls * box.max_result_tokens, turns.limits.max_new_tokens)
