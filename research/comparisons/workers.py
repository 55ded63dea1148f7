"""A system under test as a process: told its work, asked for one repetition at a time, closed."""

import contextlib
import json
import os
import select
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from research.comparisons.timing import Series
from research.core.errors import TemperError


class SystemFailed(TemperError):
    """A system ended, hung or said something unexpected."""


class System(NamedTuple):
    """How a system is started: its command speaks the protocol of `experiments/comparisons/protocol.py`."""

    name: str
    command: tuple[str, ...]
    path: str = ""  # PYTHONPATH


class Worker:
    """One system at work on one workload. A context manager."""

    def __init__(self, system: System, threads: int, timeout: float, log: Path) -> None:
        """Starts the process on its cores; it waits for its workload, and writes its standard error to `log`.

        `timeout` is in seconds, of building and of each repetition.
        """
        self._facts: dict[str, Any] = {}
        self._laps: list[dict[str, Any]] = []
        self._name, self._timeout, self._log = system.name, timeout, log
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC")
        env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        env |= dict.fromkeys(names, str(threads)) | ({"PYTHONPATH": system.path} if system.path else {})
        env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several systems hold a GPU: none may take all its memory
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                system.command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self._process.pid, sorted(os.sched_getaffinity(0))[:threads])

    def start(self, work: Mapping[str, Any], parameters: int) -> None:
        """Hands over the work and warms up; SystemFailed if its model has another number of parameters."""
        self._facts = self._ask(json.dumps(work))
        found = self._facts["parameters"]
        if abs(found - parameters) > 0.01 * parameters:
            raise SystemFailed(f"{self._name}: its model has {found:,} parameters, expected Temper's {parameters:,}")
        self.run()
        self.run()

    def run(self) -> None:
        """One repetition; SystemFailed if it ends, takes too long or does not answer in JSON."""
        began = time.perf_counter()
        counts = self._ask("run")
        self._laps.append({"seconds": time.perf_counter() - began, **counts})

    def series(self) -> Series:
        """The repetitions after the warm-up, with the system's `parameters` and `versions`."""
        warm_up, laps = self._laps[:2], self._laps[2:]
        about = {**self._facts, "warm_up": [lap["seconds"] for lap in warm_up]}
        about["peak_bytes"] = max(lap["peak_bytes"] for lap in laps)
        return Series(tuple(lap["seconds"] for lap in laps), tuple(lap["tokens"] for lap in laps), about)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        """Asks the process to end, and ends it if it does not."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stdout.close()

    def _ask(self, line: str) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # it has ended: reading says so
            self._stdin.write(line.encode() + b"\n")
            self._stdin.flush()
        if not select.select([self._stdout], [], [], self._timeout)[0]:
            raise self._failed(f"did not answer within {self._timeout:g} seconds")
        answer = self._stdout.readline()
        if not answer:
            raise self._failed(f"ended with exit status {self._process.wait()}")
        try:
            return dict(json.loads(answer))
        except ValueError:
            raise self._failed(f"answered {answer.decode().strip()[:80]!r}, expected JSON") from None

    def _failed(self, what: str) -> SystemFailed:
        self._process.kill()  # it must not go on in the others' turns
        written = self._log.read_text("utf-8", errors="replace").strip()
        reason = f": {written.splitlines()[-1].strip()} (more in {self._log})" if written else ""
        return SystemFailed(f"{self._name}: {what}{reason}")
