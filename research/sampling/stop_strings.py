"""Stop strings: a completion ends at the token that completes one of them, and its text is shown without it.

Host side, between chunks of decode steps. Strings are found in bytes: UTF-8 lets no string begin inside of another
character, so a stop string may be spread over tokens and tokens may end within a character.
"""

import codecs
from collections import defaultdict
from collections.abc import Sequence

from research.core.errors import ConfigError
from research.sampling.rows import Row, StopRow


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
