"""A system under test as a process: started, warmed up, asked for one repetition at a time, closed."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from research.core.errors import ConfigError, TemperError

SYSTEMS = Path(__file__).resolve().parent / "systems"
PEERS = ("transformers", "trl", "tunix")
"""What `--peers` may name; each is a program in `systems/`."""

_SHOWN_LINES = 20


class SystemFailed(TemperError):
    """A system ended, hung or said something unexpected; `stderr` holds the end of what it wrote."""

    def __init__(self, message: str, stderr: str) -> None:
        super().__init__(message)
        self.stderr = stderr


class System(NamedTuple):
    """How a system is started.

    Attributes:
      name: as the report shows it.
      command: program and arguments.
      folder: working folder.
    """

    name: str
    command: tuple[str, ...]
    folder: Path


def own_system(name: str) -> System:
    """A system that runs in this Python, with all of Temper at hand; it starts as a command does."""
    module = f"research.benchmarks.systems.{name}"
    code = f"import launch, runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return System(name, (sys.executable, "-c", code), SYSTEMS.parents[2])


def peer_systems(given: Sequence[str], folder: Path) -> dict[str, System]:
    """The peers of `name=path/to/python` items.

    Args:
      given: of the command line.
      folder: an empty one, in which the peers see the programs of `systems/` and nothing else of Temper: where Temper
        is installed in a site-packages, its neighbours are no business of another Python.

    Raises:
      ConfigError: an unknown name, or no such Python.
    """
    package = folder / "research" / "benchmarks"
    package.mkdir(parents=True)
    for parent in (package.parent, package):
        (parent / "__init__.py").touch()
    (package / "systems").symlink_to(SYSTEMS, target_is_directory=True)
    found = {}
    for item in given:
        name, _, python = item.partition("=")
        if name not in PEERS:
            raise ConfigError(f"--peers: got {item!r}, expected NAME=PYTHON with one of {', '.join(PEERS)}")
        if not os.access(python, os.X_OK) or Path(python).is_dir():
            raise ConfigError(
                f"--peers: {name}: {python or 'nothing'!r} is no program, expected a venv's bin/python"
            )
        command = (str(Path(python).absolute()), "-m", f"research.benchmarks.systems.{name}")
        found[name] = System(name, command, folder)
    return found


def environment(threads: int) -> dict[str, str]:
    """This process's environment with as many threads as every system may use."""
    limits = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC")
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    # Several systems hold a GPU at a time, so none may take all of its memory.
    return {**kept, **dict.fromkeys(limits, str(threads)), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Worker:
    """One system at work on one workload. A context manager.

    Attributes:
      ready: what it said after warm-up: `first_seconds`, `second_seconds`, `parameters`, `versions`.
    """

    def __init__(self, system: System, env: Mapping[str, str], timeout: float) -> None:
        """Starts the process; it waits for its workload.

        Args:
          system: what to start.
          env: its environment.
          timeout: seconds that one repetition may take.
        """
        self.name = system.name
        self.ready: dict[str, Any] = {}
        self._timeout = timeout
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        self._process = subprocess.Popen(
            system.command,
            cwd=system.folder,
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def warm_up(self, workload: Mapping[str, Any]) -> dict[str, Any]:
        """Hands over the workload; returns what the system says after two repetitions."""
        self.ready = self._ask(json.dumps(workload))
        return self.ready

    def run(self) -> dict[str, Any]:
        """One repetition: `seconds`, `peak_bytes` and what the system counts.

        Raises:
          SystemFailed: it ended, took too long or did not answer in JSON.
        """
        return self._ask("run")

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
        self._stderr.close()

    @property
    def _stdin(self) -> Any:
        assert self._process.stdin is not None
        return self._process.stdin

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")  # the end

    def _ask(self, line: str) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # it has ended: reading says so
            self._stdin.write(line + "\n")
            self._stdin.flush()
        try:
            answer = self._lines.get(timeout=self._timeout)
        except queue.Empty:
            raise self._failed(f"did not answer within {self._timeout:g} seconds") from None
        if not answer:
            raise self._failed(f"ended with exit status {self._process.wait()}")
        try:
            return dict(json.loads(answer))
        except ValueError:
            raise self._failed(f"answered {answer.strip()[:80]!r}, expected JSON") from None

    def _failed(self, what: str) -> SystemFailed:
        self._process.kill()  # it must not go on in the others' turns
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", errors="replace").splitlines()
        said = [line for line in lines if line.strip()]
        reason = f": {said[-1].strip()}" if said else ""
        return SystemFailed(f"{self.name}: {what}{reason}", "\n".join(said[-_SHOWN_LINES:]))
