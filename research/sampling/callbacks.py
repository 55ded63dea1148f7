"""Callbacks of the engine, on the host between chunks of decode steps: stop strings, and environments that answer.

Strings are found in bytes: UTF-8 lets no string begin inside of another character, so a stop string may be spread over
tokens and tokens may end within a character.
"""

import codecs
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from research.core.errors import ConfigError
from research.environments.base import Environment
from research.environments.turns import Episode, RowTurns, Turns
from research.sampling.rows import ForceTokens, Row, RowCallback, StopRow


class StopStringDecoder:
    """Decodes one completion, a token at a time, up to the first stop string.

    Text that may be the beginning of a stop string is held back until that is decided. Of several stop strings the one
    that is complete first counts, and of those that end at one character the longest: the text does not depend on
    how it was cut into tokens.

    Attributes:
      ended: a stop string is complete; no token may follow.
    """

    def __init__(self, table: Sequence[bytes], stops: Sequence[str] = ()) -> None:
        """An empty text, of tokens of these bytes (such as `Tokenizer.token_bytes`), until one of the strings."""
        self._table, self._stops = table, [stop.encode() for stop in stops]
        self._held = b""
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.ended = False

    def push(self, token: int, *, drawn: bool = True) -> str:
        """The text that the next token completes; a forced one (not drawn) is no part of a stop string."""
        before = len(self._held)
        self._held += self._table[token]
        certain = len(self._held)
        if drawn:
            # A stop string that was complete before would have been found then.
            for end in range(before + 1, len(self._held) + 1):
                found = [len(stop) for stop in self._stops if self._held[:end].endswith(stop)]
                if found:
                    self.ended = True
                    text, self._held = self._held[: end - max(found)], b""
                    return self._utf8.decode(text)
            certain -= self._possible()
        text, self._held = self._held[:certain], self._held[certain:]
        return self._utf8.decode(text)

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        text, self._held = self._held, b""
        return self._utf8.decode(text, final=True)

    def _possible(self) -> int:
        """Bytes at the end that a stop string could begin with."""
        starts = {stop[:length] for stop in self._stops for length in range(1, len(stop))}
        return max((len(start) for start in starts if self._held.endswith(start)), default=0)


class StopStrings:
    """A `RowCallback` that ends rows at stop strings and keeps the rows' texts by their numbers."""

    def __init__(self, table: Sequence[bytes], stops: Sequence[str] = ()) -> None:
        """See `StopStringDecoder`.

        Raises:
          ConfigError: an empty stop string.
        """
        if "" in stops:
            raise ConfigError("stop: got an empty string, expected at least one character.")
        self._texts = defaultdict[int, StopStringDecoder](lambda: StopStringDecoder(table, stops))
        self._read, self._new = defaultdict[int, int](int), defaultdict[int, str](str)

    def __call__(self, rows: Sequence[Row]) -> dict[int, StopRow]:
        """Reads the rows' new tokens; a row in which a stop string is complete ends there."""
        actions: dict[int, StopRow] = {}
        for row in rows:
            text = self._texts[row.number]
            for place in range(self._read[row.number], row.length):
                self._new[row.number] += text.push(int(row.tokens[place]), drawn=bool(row.mask[place]))
                self._read[row.number] = place + 1
                if text.ended:
                    actions[row.number] = StopRow(place + 1)
                    break
        return actions

    def take(self, number: int, *, ended: bool) -> str:
        """A row's text since the last `take`; with what was held back, if the row has ended."""
        new = self._new.pop(number, "")
        return new + self._texts[number].finish() if ended else new


class ToolCallback:
    """A `RowCallback`: a row pauses at `<|im_end|>`, is fed its environment's answer, and goes on.

    `states` are each row's turns so far, by its number.
    """

    def __init__(
        self, turns: Turns, begin: Callable[[int], Environment], first: RowCallback = lambda _rows: {}
    ) -> None:
        """Binds the turns, what begins an environment for the row of a number, and a callback that acts first."""
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
