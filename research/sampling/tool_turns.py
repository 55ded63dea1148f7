"""Environments in the engine: a row pauses at `<|im_end|>`, is fed its environment's answer, and goes on.

Host side. `research/environments/turns.py` decides what a row gets; here it becomes `ForceTokens`.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from research.environments.base import Environment
from research.environments.turns import Episode, RowTurns, Turns
from research.sampling.rows import ForceTokens, Row, RowCallback, StopRow


class ToolCallback:
    """A `RowCallback` that lets environments answer the rows which have ended a turn.

    Attributes:
      states: each row's turns so far, by its number.
    """

    def __init__(
        self, turns: Turns, begin: Callable[[int], Environment], first: RowCallback = lambda _rows: {}
    ) -> None:
        """Binds the episodes.

        Args:
          turns: advances them.
          begin: a new environment for the row of a number.
          first: another callback, such as stop strings; rows that it acts on are not answered.
        """
        self.turns, self.begin, self.first = turns, begin, first
        self.states: defaultdict[int, RowTurns] = defaultdict(RowTurns)
        self._environments: dict[int, Environment] = {}

    def __call__(self, rows: Sequence[Row]) -> Mapping[int, ForceTokens | StopRow]:
        """Answers all rows that have drawn their end-of-turn token, together."""
        actions, ended, episodes = dict(self.first(rows)), list[int](), list[Episode]()
        for row in rows:
            # A row that stopped at another token than the end of a turn has left the conversation.
            number, tokens = row.number, row.tokens[: row.length].tolist()
            if row.stopped and number not in actions and tokens[-1] == self.turns.stop_id:
                if number not in self._environments:
                    self._environments[number] = self.begin(number)
                ended.append(number)
                episodes.append((self._environments[number], self.states[number], tokens))
        for number, advance in zip(ended, self.turns.step(episodes), strict=True):
            self.states[number] = advance.state
            if advance.forced:
                actions[number] = ForceTokens(advance.forced)
        return actions
