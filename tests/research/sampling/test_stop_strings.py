"""Stop strings: found wherever tokens begin and end, held back while they may begin, and against a plain search."""

import itertools

import numpy as np
import pytest

from research.core.errors import ConfigError
from research.sampling.callbacks import StopStringDecoder, StopStrings
from research.sampling.rows import Request, Row, StopRow

BYTES = [bytes([byte]) for byte in range(256)]


def cut(text: bytes, places: tuple[int, ...]) -> list[bytes]:
    """The pieces of a text between these places."""
    edges = [0, *places, len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def stream(pieces: list[bytes], stops: tuple[str, ...]) -> tuple[list[str], int | None]:
    """What each push and the end return, and which piece ended the text."""
    text, shown = StopStringDecoder(pieces, stops), []
    for token in range(len(pieces)):
        shown.append(text.push(token))
        if text.ended:
            return [*shown, text.finish()], token
    return [*shown, text.finish()], None


def expected(text: bytes, stops: tuple[str, ...]) -> tuple[str, int | None]:
    """The text before the stop string that is complete first, and where that one ends."""
    for end in range(1, len(text) + 1):
        found = [stop.encode() for stop in stops if text[:end].endswith(stop.encode())]
        if found:
            return text[: end - max(map(len, found))].decode(), end
    return text.decode(), None


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("one\nnext", ("\n",)),
        ("abcabcd", ("abcd",)),
        ("aaaab", ("aab",)),
        ("xabcdy", ("abcd", "bc")),  # the shorter one is complete first
        ("xabcy", ("bc", "abc")),  # both at once: the longer one counts
        ("naïve €5", ("€",)),
        ("日本語", ("本語",)),
        ("no stop he", ("here", "stopped")),
        ("end.", ("end.",)),
        ("plain", ()),
    ],
)
def test_however_it_is_cut_into_tokens(text: str, stops: tuple[str, ...]) -> None:
    whole = text.encode()
    shown, end = expected(whole, stops)
    for count in range(4):
        for places in itertools.combinations(range(1, len(whole)), count):
            pieces = cut(whole, places)
            parts, ended = stream(pieces, stops)
            assert "".join(parts) == shown, pieces
            ends = list(itertools.accumulate(map(len, pieces)))
            assert ended == (None if end is None else next(i for i, e in enumerate(ends) if e >= end)), pieces


def test_what_may_begin_a_stop_string_is_held_back_and_nothing_else() -> None:
    parts, ended = stream([bytes([c]) for c in b"a<b<en<end>x"], ("<end>",))
    assert parts[:6] == ["a", "", "<b", "", "", ""] and ended == 10
    assert parts[6:] == ["<en", "", "", "", "", ""]  # the second "<" lets go of the first beginning
    parts, _ = stream([b"ab", b"ab"], ("abc",))
    assert parts == ["", "ab", "ab"]


def test_half_of_a_character_waits_and_a_lone_half_is_replaced() -> None:
    euro = "€".encode()
    parts, _ = stream([b"a", euro[:1], euro[1:2], euro[2:], b"b", euro[:2]], ("x",))
    assert parts == ["a", "", "", "€", "b", "", "\ufffd"]


def test_given_tokens_have_no_part_in_a_stop_string() -> None:
    text = StopStringDecoder([b"e", b"n", b"d"], ("end",))
    assert [text.push(0), text.push(1, drawn=False), text.push(2)] == ["", "en", "d"]
    assert not text.ended
    assert "".join(text.push(token) for token in range(3)) == "" and text.ended


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match="stop: got an empty string"):
        StopStrings(BYTES, ("a", ""))


def row_of(number: int, text: bytes) -> Row:
    row = Row(number, Request(np.array([1]), 0, number, 20))
    row.tokens[: len(text)], row.mask[: len(text)], row.length = list(text), True, len(text)
    return row


def test_the_look_ends_each_row_at_its_own_token() -> None:
    strings = StopStrings(BYTES, ("\n\n",))
    rows = [row_of(0, b"ab\n"), row_of(7, b"x\n\nyz")]
    assert strings(rows) == {7: StopRow(3)}, "tokens of the chunk behind the stop string are dropped"
    assert (strings.take(0, ended=False), strings.take(7, ended=True)) == ("ab", "x")
    assert strings([row_of(0, b"ab\n\nc")]) == {0: StopRow(4)}
    assert strings.take(0, ended=True) == ""
    assert strings([row_of(3, b"q\n")]) == {} and strings.take(3, ended=True) == "q\n"
