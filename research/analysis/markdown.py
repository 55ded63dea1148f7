"""Pieces of Markdown."""

import re
from collections.abc import Sequence


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    one_line = " ".join(text.split())
    return re.sub(r"[\\`*{}\[\]<>#|~&]|(?<!\w)_|_(?!\w)", r"\\\g<0>", one_line)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right_from: int | None = None) -> str:
    """A table; columns from `right_from` on are aligned to the right."""
    marks = ["---:" if right_from is not None and i >= right_from else "---" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, marks, *rows])
