"""Pieces of Markdown."""

import re
from collections.abc import Sequence


def printable(text: str) -> str:
    """The text on one line; controls, bidirectional marks and lone surrogates show as `\\x00`, `\\u202e`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in " ".join(text.split()))


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line; `$` too, which some renderers read as mathematics."""
    text = re.sub(r"[\\`*{}\[\]<>#|~&$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", printable(text))
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", text)  # else a list or a heading


def code(text: str) -> str:
    """A code span for a table cell; a pipe must be escaped even there."""
    one_line = printable(text).replace("|", "\\|") or " "
    fence, blank = _fence(one_line, 1), " " if "`" in one_line else ""  # Markdown strips one blank at either end
    return f"{fence}{blank}{one_line}{blank}{fence}"


def fenced(text: str) -> str:
    """A code block."""
    fence = _fence(text, 3)
    return f"{fence}text\n{text.rstrip()}\n{fence}"


def _fence(text: str, least: int) -> str:
    """More backticks than stand together in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right_from: int | None = None) -> str:
    """A table; columns from `right_from` on are aligned to the right."""
    marks = ["---:" if right_from is not None and i >= right_from else "---" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, marks, *rows])
