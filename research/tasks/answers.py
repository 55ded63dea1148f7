"""Final answers: where a completion states one, and when two of them are the same.

Numbers are compared as exact rationals, whatever their spelling: "$1,200.50", "1200.5", "12005e-1" and "2401/2" are
equal. Currency and percent signs are units and are dropped; "50%" also equals 0.5. Other text is compared as it is.
Everything here takes any text, in time linear in its length, and never raises.
"""

import re
from collections import deque
from fractions import Fraction
from typing import Literal, NamedTuple

Matcher = Literal["mark", "plain", "normalized"]
"""Where the answer of a completion is looked for, from strict to lenient.

mark: behind the last "####", to the end of its line, or in the last \\boxed{}, whichever comes later.
plain: the whole completion, or its last line.
normalized: as mark; without one the last number, or the last line without regard to case.
"""

MARK = "####"
_BOX = "\\boxed{"
_LONGEST_NUMBER = 100  # characters
_LARGEST_EXPONENT = 400
_MINUS = str.maketrans({"\u2212": "-", "\u2013": "-"})
_MARKUP = " \t\r\n*`"
_BRACES = re.compile(r"[{}]")
_FRAC = re.compile(r"(-?)\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}")
_NUMBER = re.compile(
    r"(?P<sign>[+-]?) ?(?:\\?[$€£] ?)?(?P<late_sign>[+-]?) ?"
    r"(?:(?P<over>[0-9]+) ?/ ?(?P<under>[0-9]+)"
    r"|(?P<whole>[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]*)(?:\.(?P<places>[0-9]*))?(?:[eE](?P<power>[+-]?[0-9]{1,9}))?)"
    r"(?P<percent> ?\\?%)?"
)
_IN_TEXT = re.compile(
    r"(?<!\w)(?<![0-9][.,/])(?:[-+][$€£]?|[$€£]-?)?(?:[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)"
    r"(?:[eE][+-]?[0-9]+)?(?:/[0-9]+)?(?:\\?%)?"
)


def extract_final_answer(text: str, how: Matcher = "mark") -> str | None:
    """The answer that a completion states, spelled as all equal ones are, for votes; None where it states none.

    "$1,200.50", "+1200.5" and "2401/2" are "1200.5", "2/6" is "1/3". Other text is without blanks and markup ("**")
    around it, and without a full stop at its end.
    """
    if how == "plain":
        return _read(_last_line(text)).text or None
    found = _marked(text)
    if how == "normalized":
        found = _folded(found or _last_number(text) or _read(_last_line(text)))
    return (found.text or None) if found is not None else None


def matches(completion: str, answer: str, how: Matcher = "mark") -> bool:
    """Whether the completion states this answer.

    Args:
      completion: any text.
      answer: the bare answer, or a worked solution that ends in one ("... #### 18").
      how: where to look. Under "normalized" a number is expected where `answer` is one, and the last line otherwise.
    """
    expected = _marked(answer) or _read(answer)
    if not expected.text:
        return False
    if how == "plain":
        return any(_equal(_read(part), expected) for part in (completion, _last_line(completion)))
    found = _marked(completion)
    if how == "mark":
        return found is not None and _equal(found, expected)
    if found is None:
        found = _read(_last_line(completion)) if expected.value is None else _last_number(completion)
    return found is not None and _equal(_folded(found), _folded(expected))


class _Answer(NamedTuple):
    """An answer that was read: canonical text, and its value where it is a number."""

    text: str
    value: Fraction | None = None
    percent: bool = False


def _marked(text: str) -> _Answer | None:
    """Behind the last mark or in the last box; None where there is none, or nothing in it."""
    mark, box = text.rfind(MARK), text.rfind(_BOX)
    if max(mark, box) < 0:
        return None
    found = _read(text[mark + len(MARK) :].partition("\n")[0] if mark > box else _braced(text, box + len(_BOX)))
    return found if found.text else None


def _braced(text: str, start: int) -> str:
    """Up to the brace that closes what opened before `start`; "" where none does."""
    depth = 1
    for brace in _BRACES.finditer(text, start):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[start : brace.start()]
    return ""


def _last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2]


def _last_number(text: str) -> _Answer | None:
    found = deque(_IN_TEXT.finditer(text.translate(_MINUS)), maxlen=1)
    return _read(found[0].group()) if found else None


def _read(text: str) -> _Answer:
    text = text.strip()
    bare = text.strip(_MARKUP).rstrip(f".{_MARKUP}")
    if bare.startswith("$") and bare.endswith("$"):  # LaTeX
        bare = bare.lstrip(f"${_MARKUP}").rstrip(f".${_MARKUP}")
    bare = bare or text
    if len(bare) > _LONGEST_NUMBER:
        return _Answer(bare)
    found = _NUMBER.fullmatch(_FRAC.sub(r"\1\2/\3", " ".join(bare.translate(_MINUS).split())))
    value = None if found is None else _value(found)
    if found is None or value is None:
        return _Answer(bare)
    return _Answer(_spelled(value), value, found["percent"] is not None)


def _value(found: re.Match[str]) -> Fraction | None:
    """The exact value; None where the pattern holds no number."""
    whole, places, power = found["whole"] or "", found["places"] or "", int(found["power"] or 0)
    under = int(found["under"] or 1)
    digits = found["over"] or whole.replace(",", "") + places
    if (found["sign"] and found["late_sign"]) or not digits or not under or abs(power) > _LARGEST_EXPONENT:
        return None
    value = Fraction(int(digits), under) * Fraction(10) ** (power - len(places))
    return -value if "-" in (found["sign"], found["late_sign"]) else value


def _spelled(value: Fraction) -> str:
    """The decimal number where it ends, else n/d."""
    places = value.denominator.bit_length()  # enough for any denominator 2^a 5^b
    shifted, rest = divmod(abs(value.numerator) * 10**places, value.denominator)
    if rest:
        return str(value)
    digits = str(shifted).rjust(places + 1, "0")
    number = f"{digits[:-places]}.{digits[-places:]}".rstrip("0").rstrip(".")
    return f"-{number}" if value < 0 else number


def _folded(answer: _Answer) -> _Answer:
    """Without regard to case and to the width of blanks."""
    return answer._replace(text=" ".join(answer.text.casefold().split()))


def _equal(one: _Answer, other: _Answer) -> bool:
    if one.value is None or other.value is None:
        return one.text == other.text
    if one.percent == other.percent or one.value == other.value:
        return one.value == other.value
    return one.value / (100 if one.percent else 1) == other.value / (100 if other.percent else 1)
