"""How every picture looks: colours, titles, and PNG files that are the same bytes for the same numbers."""

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from research.core.files import write_bytes_atomic

# Okabe and Ito's colours, told apart by colour-blind readers too; the control is grey. Markers repeat it.
CONTROL_COLOR = "#6b6b6b"
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
MARKERS = ("s", "^", "D", "v", "P", "X")
INK, FAINT = "#222222", "#dddddd"
DPI = 160


def dress(axes: Axes, title: str, subtitle: str) -> None:
    """A bold title on the left, below it what the marks mean; no box."""
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=22)
    axes.annotate(subtitle, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=9,
                  color="#555555", va="bottom")  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=10, colors=INK)


def save(figure: Figure, path: Path) -> Path:
    """Writes a PNG whole or not at all; returns `path`.

    Raises:
      WorkdirError: it cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    write_bytes_atomic(path, buffer.getvalue())
    return path
