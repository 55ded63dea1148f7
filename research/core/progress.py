"""Progress of long work: a bar with rates and time left on a terminal (bars nest), plain lines in a log."""

import time
from collections import deque
from collections.abc import Callable, Mapping

from rich import get_console
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

WINDOW_SECONDS = 60.0  # rates are those of the last minute, so that compilation in the first step fades away
LINE_SECONDS = 20.0  # a plain line at most this often


def say(line: str, console: Console | None = None) -> None:
    """Prints one line as it is, on standard output unless a console is given."""
    (console or get_console()).print(line, markup=False, highlight=False, soft_wrap=True)


class Progress:
    """Shows how far one piece of work has come.

    with Progress("grpo, seed 1", total=200, unit="steps") as bar:
        bar.advance(1, tokens=4096, metrics={"loss": 0.7})
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        unit: str = "steps",
        *,
        initial: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepares the bar, which is shown between `__enter__` and `__exit__`.

        A `total` of None is unknown; `unit` is what is counted, in the plural. The `initial` units, which a resumed run
        has done already, do not count towards the rates.
        """
        self.description, self.total, self.unit = description, total, unit
        self.done, self.tokens = initial, 0
        self._metrics: dict[str, float] = {}
        self._console, self._clock = console or get_console(), clock
        self._marks: deque[tuple[float, int, int]] = deque()  # when so many units and tokens were done
        self._line_at: float | None = None
        self._line_done = -1
        self._bar: RichProgress | None = None

    def __enter__(self) -> "Progress":
        self._marks.append((self._clock(), self.done, self.tokens))
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[note]}", markup=False),
                console=self._console,
            )
            self._bar.add_task(escape(self.description), total=self.total, completed=self.done, note=self.summary())
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.done != self._line_done:
            self._print_line()

    def advance(self, amount: int = 1, *, tokens: int = 0, metrics: Mapping[str, float] | None = None) -> None:
        """Counts what is known to be finished, on a device too; `metrics` are shown until they are replaced."""
        self.done += amount
        self.tokens += tokens
        if metrics is not None:
            self._metrics = {key: float(value) for key, value in metrics.items()}
        now = self._clock()
        self._marks.append((now, self.done, self.tokens))
        while len(self._marks) > 2 and self._marks[1][0] <= now - WINDOW_SECONDS:
            self._marks.popleft()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, note=self.summary())
        elif self._line_at is None or now - self._line_at >= LINE_SECONDS:
            self._print_line()

    def exclude(self, seconds: float) -> None:
        """Leaves the last `seconds`, which went into something else, out of the rates."""
        self._marks = deque((then + seconds, done, tokens) for then, done, tokens in self._marks)

    def summary(self) -> str:
        """The state in words: "120/200 steps (60%), 3.2 steps/s, 12,345 tokens/s, 0:25 left, loss 1.23"."""
        (start, done, tokens), (now, _, _) = self._marks[0], self._marks[-1]
        elapsed = now - start
        parts = [f"{self.done} {self.unit}"]
        if self.total:
            parts = [f"{self.done}/{self.total} {self.unit} ({100 * self.done // self.total}%)"]
        rate = (self.done - done) / elapsed if elapsed > 0 else 0.0
        if rate > 0:
            parts.append(f"{rate:,.3g} {self.unit}/s" if rate >= 0.1 else f"{_span(1 / rate)} each")
            if self.tokens > tokens:
                parts.append(f"{(self.tokens - tokens) / elapsed:,.0f} tokens/s")
            if self.total and self.total > self.done:
                parts.append(f"{_span((self.total - self.done) / rate)} left")
        parts += [f"{key} {value:.4g}" for key, value in self._metrics.items()]
        return ", ".join(parts)

    def say(self, line: str) -> None:
        """Prints a line of its own, above the bar where there is one."""
        say(f"{self.description}: {line}", self._console)

    def _print_line(self) -> None:
        self._line_at, self._line_done = self._marks[-1][0], self.done
        self.say(self.summary())


def _span(seconds: float) -> str:
    """Seconds as "0:25", "12:05" or "3:12:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours = f"{minutes // 60}:" if minutes >= 60 else ""
    return f"{hours}{minutes % 60:{'02' if hours else ''}d}:{rest:02d}"
