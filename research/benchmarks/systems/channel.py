"""How a system under test talks to the benchmark: JSON lines over standard input and output.

A system is a program `python -m research.benchmarks.systems.<name>` in a Python of its own. It reads one line, the
workload; does one repetition after the other, each closed with `lap`; and goes on whenever a line asks it to. The
first two are warm-up: what the first takes beyond the second is compilation. Standard library only, because each
system's venv holds that system and nothing of Temper's.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn


class Channel:
    """The system's end of the two pipes."""

    def __init__(self) -> None:
        """Reads the workload and keeps this process to the cores it may use."""
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # what libraries print must not mix with our lines
        self.workload: dict[str, Any] = json.loads(sys.stdin.readline())
        if hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, cores[: self.workload["threads"]])
        self._facts: dict[str, Any] = {}
        self._warm: list[float] = []
        self._since = time.perf_counter()

    def describe(self, *, parameters: int, versions: dict[str, str]) -> None:
        """Says what will be timed, and starts the clock of the first repetition.

        Args:
          parameters: of the model, so that all systems can be seen to run the same one.
          versions: of the packages that do the work.
        """
        self._facts = {"parameters": parameters, "versions": versions}
        self._since = time.perf_counter()

    def lap(self, **values: float) -> None:
        """Ends a repetition, tells how long it took together with `values`, waits until the next is asked for."""
        seconds = time.perf_counter() - self._since
        if len(self._warm) < 2:
            self._warm.append(seconds)
            if len(self._warm) == 2:
                self._send(first_seconds=self._warm[0], second_seconds=self._warm[1], **self._facts)
                self._wait()
        else:
            self._send(seconds=seconds, peak_bytes=_peak_bytes(), **values)
            self._wait()
        self._since = time.perf_counter()

    def repeat(self, run: Callable[[], dict[str, float]]) -> NoReturn:
        """Laps around `run`, which returns a lap's values, until nobody asks for more."""
        while True:
            self.lap(**run())

    def _send(self, **message: Any) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit(0)


def _peak_bytes() -> int:
    """The most resident memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
