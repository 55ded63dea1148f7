"""How every picture looks: colours, text, titles, and files that are the same bytes for the same numbers."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine

from research.analysis.markdown import printable
from research.core.files import write_bytes_atomic

# Okabe and Ito's colours, told apart by colour-blind readers too; the control is grey. Markers repeat it.
CONTROL_COLOR = "#6b6b6b"
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
MARKERS = ("s", "^", "D", "v", "P", "X")
INK, FAINT, SOFT = "#222222", "#dddddd", "#555555"
DPI = 160
STYLE: Any = {"text.parse_math": False, "svg.hashsalt": "temper", "pdf.fonttype": 42}
"""For `matplotlib.rc_context` around drawing and saving: names are text, not mathematics; no random ids."""
_METADATA = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}


def dress(axes: Axes, title: str, subtitle: str) -> None:
    """A bold title on the left, below it what the marks mean, if anything; no box."""
    pad = 22 if subtitle else 6
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=pad)
    axes.annotate(subtitle, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=9,
                  color=SOFT, va="bottom")  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=10, colors=INK)


def panels(
    count: int, *, columns: int, width: float, height: float, least: float = 0.0, share: bool = False
) -> tuple[Figure, list[Axes]]:
    """A white figure with `count` panels, at most so many `columns` in a row, laid out so that nothing overlaps.

    `width` and `height` are a panel's, `least` is a width of the whole figure, in inches; they may `share` their axes.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (max(least, width * columns), height * rows)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08), facecolor="white")
    found = list(figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share).ravel())
    for axes in found[count - columns : count]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    for axes in found[count:]:
        axes.set_axis_off()
    return figure, found[:count]


def drawable(names: Sequence[str], width: int) -> list[str]:
    """Names for labels: one line of at most `width` characters that the font has, all different.

    The middle of a long name becomes "…"; a name that is then taken gets a number behind.
    """
    font = get_font(findfont(FontProperties()))
    found: list[str] = []
    for name in names:
        text = "".join(
            c if font.get_char_index(ord(c)) else c.encode("unicode_escape").decode("ascii") for c in printable(name)
        )
        if len(text) > width:
            text = f"{text[: width - width // 2 - 1]}…{text[len(text) - width // 2 :]}"
        base, number = text, 2
        while text in found:
            text, number = f"{base} ({number})", number + 1
        found.append(text)
    return found


def panel_title(name: str) -> str:
    """An arm's name above a small panel: two lines of 26 characters at most, so that a grid's arms differ."""
    return textwrap.fill(drawable([name], 50)[0], 26)


def legend_below(figure: Figure, handles: Sequence[Artist], names: Sequence[str]) -> None:
    """A legend below the panels, of as many columns as fit; makes the figure higher by its rows."""
    labels = drawable(names, 48)
    width, height = figure.get_size_inches()
    column = max(0.75 + 0.085 * len(label) for label in labels)  # inches, roughly: line, gap and 10 pt letters
    columns = max(1, min(len(labels), int(width / column)))
    figure.set_size_inches(width, height + 0.22 * -(-len(labels) // columns))
    legend = figure.legend(handles, ["x"] * len(labels), loc="outside lower center", ncols=columns,
                           frameon=False, fontsize=10)  # fmt: skip
    for text, label in zip(legend.get_texts(), labels, strict=True):  # a name may begin with "_" or hold "$"
        text.set_text(label)


def save(figure: Figure, path: Path, kinds: Sequence[str] = ()) -> Path:
    """Writes a PNG, PDF or SVG, as the suffix says, and other `kinds` beside it, each whole or not at all."""
    for kind in dict.fromkeys((path.suffix[1:], *kinds)):
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            figure.savefig(buffer, format=kind, dpi=DPI, metadata=_METADATA[kind])
        write_bytes_atomic(path.with_suffix(f".{kind}"), buffer.getvalue())
    return path
