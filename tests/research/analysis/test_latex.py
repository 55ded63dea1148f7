"""LaTeX: every character is shown as it is; rows are rows."""

import re

import pytest

from research.analysis.latex import booktabs, escape

COMMANDS = {
    r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\textbar{}": "|",
    r"\textquotedbl{}": '"', "$-$": "−", "$<$": "<", "$>$": ">", "{[}": "[", "{]}": "]", "--": "–",
}  # fmt: skip


def shown(latex: str) -> str:
    """What LaTeX would set; anything special that is not escaped stands out."""
    pattern = "|".join(map(re.escape, COMMANDS)) + r"|\\[%$#&_{}]|[%$#&_{}\\~^]"
    return re.sub(pattern, lambda m: COMMANDS.get(m[0], m[0][1:] if len(m[0]) == 2 else f"BAD {m[0]}"), latex)


@pytest.mark.parametrize("text", ["a_b & 50% #1", r"\frac{a}{b}", "$x^$", '~^|"<>[]', "−1 – 2", "größe"])
def test_text_is_shown_as_it_is(text):
    assert shown(escape(text)) == text


def test_a_table_has_a_row_for_each_and_a_comment_stays_one_line():
    text = booktabs(["arm", "n"], [["[a]", "1"], ["b\nc", "2"]], comment="x\ny")
    assert text.splitlines() == [
        "% x y", r"% \usepackage{booktabs}", r"\begin{tabular}{lr}", r"\toprule", r"arm & n \\", r"\midrule",
        r"{[}a{]} & 1 \\", r"b c & 2 \\", r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip
