"""Stop strings: a completion ends at the token that completes one of them, and its text is shown without it.

Host side, between chunks of decode steps. Strings are found in bytes: UTF-8 lets no string begin inside of another
character, so a stop string may be spread over tokens and tokens may end within a character.
"""

import codecs
from collections.abc import Sequence

from research.core.errors import ConfigError
from research.sampling.rows import Row, StopRow


class StopStringDecoder:
    """Decodes one completion, a token at a time, up to the first stop string.

    Text that may be the beginning of a stop string is held back until that is decided. Of several stop strings the one
    that is complete first counts, and of those that end at one character the longest: the text does not depend on
    how it was cut into tokens.
    """

    def __init__(self, table: Sequence[bytes], stops: Sequence[str] = ()) -> None:
        """An empty text.

        Args:
          table: the bytes that each token id stands for, such as `Tokenizer.token_bytes`.
          stops: strings that end it.

        Raises:
          ConfigError: an empty stop string.
        """
        if "" in stops:
            raise ConfigError("stop: got an empty string, expected at least one character.")
        self._table, self._stops = table, [stop.encode() for stop in stops]
        self._held = b""
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.ended = False

    def push(self, token: int, *, drawn: bool = True) -> str:
        """The text that this token completes.

        Args:
          token: the next id; must not follow one that completed a stop string.
          drawn: False for a forced token: it cannot be part of a stop string.

        Raises:
          ValueError: the text has ended.
        """
        if self.ended:
            raise ValueError("stop string: the text has ended, expected no further token.")
        if not drawn:
            text, self._held = self._held + self._table[token], b""
            return self._utf8.decode(text)
        before = len(self._held)
        self._held += self._table[token]
        # A stop string that was complete before would have been found then.
        for end in range(before + 1, len(self._held) + 1):
            found = [stop for stop in self._stops if self._held[:end].endswith(stop)]
            if found:
                self.ended, text = True, self._held[: end - max(map(len, found))]
                self._held = b""
                return self._utf8.decode(text)
        certain = len(self._held) - self._possible()
        text, self._held = self._held[:certain], self._held[certain:]
        return self._utf8.decode(text)

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        text, self._held = self._held, b""
        return self._utf8.decode(text, final=True)

    def _possible(self) -> int:
        """Bytes at the end that a stop string could begin with."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops if len(stop) > length):
                return length
        return 0


class StopStrings:
    """A `RowCallback` that ends rows at stop strings and keeps the rows' texts by their numbers."""

    def __init__(self, table: Sequence[bytes], stops: Sequence[str] = ()) -> None:
        """See `StopStringDecoder`."""
        StopStringDecoder(table, stops)  # refuses an empty stop string before anything is drawn
        self._table, self._stops = table, tuple(stops)
        self._texts: dict[int, StopStringDecoder] = {}
        self._read: dict[int, int] = {}
        self._new: dict[int, str] = {}

    def __call__(self, rows: Sequence[Row]) -> dict[int, StopRow]:
        """Reads the rows' new tokens; a row in which a stop string is complete ends there."""
        actions: dict[int, StopRow] = {}
        for row in rows:
            text = self._texts.setdefault(row.number, StopStringDecoder(self._table, self._stops))
            for place in range(self._read.get(row.number, 0), row.length):
                new = text.push(int(row.tokens[place]), drawn=bool(row.mask[place]))
                self._new[row.number] = self._new.get(row.number, "") + new
                self._read[row.number] = place + 1
                if text.ended:
                    actions[row.number] = StopRow(place + 1)
                    break
        return actions

    def take(self, number: int, *, ended: bool) -> str:
        """A row's text since the last `take`; with what was held back, if the row has ended."""
        new = self._new.pop(number, "")
        return new + self._texts[number].finish() if ended else new
