"""Numbers as people read them: accuracies in percent, differences in points, budgets in millions."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from research.analysis.glossary import describe
from research.analysis.statistics import Interval

NOTHING = "–"


@dataclass(frozen=True)
class MetricFormat:
    """How one metric is shown."""

    name: str
    percent: bool  # show 0.412 as 41.2%
    higher_is_better: bool

    @property
    def label(self) -> str:
        """For a plot's axis."""
        return f"{self.name} (%)" if self.percent else self.name

    def value(self, value: float | None) -> str:
        """A value: "41.2%" or "0.4123"."""
        return NOTHING if value is None else _minus(f"{100 * value:.1f}%" if self.percent else f"{value:.4g}")

    def difference(self, value: float | None) -> str:
        """A difference with its sign; percentages differ by points: "+22.6 pp"."""
        return NOTHING if value is None else _minus(f"{100 * value:+.1f} pp" if self.percent else f"{value:+.4g}")

    def interval(self, interval: Interval | None) -> str:
        """An interval of values: "[38.0, 44.4]"."""
        if interval is None:
            return NOTHING
        ends = (f"{100 * end:.1f}" if self.percent else f"{end:.4g}" for end in interval)
        return f"[{', '.join(map(_minus, ends))}]"


def is_proportion(metric: str, values: Iterable[float]) -> bool:
    """Whether a metric reads best as a percentage: the glossary says so and its values lie in [0, 1]."""
    found = describe(metric)
    shares = found is not None and found.unit in ("fraction", "probability")
    return shares and all(0.0 <= value <= 1.0 for value in values)


def format_p(p: float | None) -> str:
    """A p-value to two digits; "< 0.001" below that."""
    return NOTHING if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def format_count(count: float) -> str:
    """A count in words of three digits: 950, "2.4 M", "31.5 G"; FLOPs beyond in powers of ten."""
    if not math.isfinite(count):
        return NOTHING
    for place, suffix in enumerate(("", " k", " M", " G")):
        scaled = count / 1000**place
        if abs(scaled) < 999.5:
            return f"{scaled:.3g}{suffix}" if suffix else f"{scaled:.0f}"
    return f"{count:.2e}".replace("e+", "e")


def format_seconds(seconds: float) -> str:
    """A duration: "45 s", "12 min 5 s", "3 h 12 min"."""
    if not math.isfinite(seconds):
        return NOTHING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s" if seconds >= 10 else f"{seconds:.1f} s"


def _minus(number: str) -> str:
    """The number with a real minus sign, which no browser breaks a line at."""
    return "\N{MINUS SIGN}" + number[1:] if number.startswith("-") else number
