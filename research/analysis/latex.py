"""A LaTeX table in the style of the package booktabs."""

from collections.abc import Sequence

from research.analysis.markdown import printable

_SPECIAL = {c: f"\\{c}" for c in "%$#&_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "[": "{[}",
    "]": "{]}",
    "\N{MINUS SIGN}": "$-$",
    "\N{EN DASH}": "--",
}


def escape(text: str) -> str:
    """Text that LaTeX shows as it is; other scripts than Latin need XeLaTeX or LuaLaTeX and a font."""
    return "".join(_SPECIAL.get(c, c) for c in printable(text))


def booktabs(header: Sequence[str], rows: Sequence[Sequence[str]], *, comment: str) -> str:
    """A `tabular` of plain text after a line of comment: the first column to the left, the others to the right."""
    first, *rest = (" & ".join(map(escape, row)) + r" \\" for row in [header, *rows])
    begin = [f"% {printable(comment)}", r"% \usepackage{booktabs}", rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}"]
    return "\n".join([*begin, r"\toprule", first, r"\midrule", *rest, r"\bottomrule", r"\end{tabular}", ""])
