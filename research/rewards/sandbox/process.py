"""A sandboxed program seen from outside: its limits, the watch over it, and how it ended."""

import os
import select
import signal
import subprocess
import time
from dataclasses import asdict, dataclass
from typing import Literal

from research.core.errors import ConfigError


@dataclass(frozen=True)
class SandboxLimits:
    """What one program may use.

    Attributes:
      cpu_s: seconds of processor time, whole; the start of the interpreter (some 0.02 s) included.
      memory_mb: MiB of address space (the bare interpreter takes 16).
      output_bytes: bytes that are read of what it prints; at the next one it is killed.
      wall_s: seconds until it is killed. None: ten times `cpu_s` and ten more, so that whether a program that
        computes reaches its end depends on the processor time it takes, not on what else the machine does.
    """

    cpu_s: int = 5
    memory_mb: int = 256
    output_bytes: int = 20_000
    wall_s: float | None = None

    def __post_init__(self) -> None:
        """Checks the ranges."""
        least = {"cpu_s": 1, "memory_mb": 64, "output_bytes": 1, "wall_s": 0.1}
        for name, bound in least.items():
            value = asdict(self)[name]
            if value is not None and value < bound:
                raise ConfigError(f"python sandbox: {name}: got {value}, expected >= {bound}.")

    @property
    def deadline_s(self) -> float:
        """Seconds of wall time until a program is killed."""
        return 10.0 * self.cpu_s + 10.0 if self.wall_s is None else self.wall_s


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
      output: standard output and error as they came, at most `output_bytes` of UTF-8.
      status: its exit status, 128 + n where signal n ended it.
      ended: "exit", or the limit that it was killed at: "cpu" (processor time), "wall" (time), "output".
    """

    output: str
    status: int
    ended: Literal["exit", "cpu", "wall", "output"]

    @property
    def last_line(self) -> str:
        """The last line of output that is not blank: an exception's, where one ended the program."""
        lines = [line for line in self.output.splitlines() if line.strip()]
        return lines[-1].strip() if lines else "nothing was printed"


def watch(process: "subprocess.Popen[bytes]", limits: SandboxLimits) -> Outcome:
    """Reads until the end, the deadline or the output's limit; then nothing of the process is left."""
    assert process.stdout is not None
    deadline = time.monotonic() + limits.deadline_s
    output, ended = b"", "exit"
    try:
        with process.stdout as pipe:
            poll = select.poll()  # select takes no descriptor above 1023
            poll.register(pipe, select.POLLIN)
            while True:
                if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
                    ended = "wall"
                    break
                read = os.read(pipe.fileno(), 65536)
                if not read:
                    break
                output += read
                if len(output) > limits.output_bytes:
                    ended = "output"
                    break
            if ended == "exit":  # it may have closed its output and gone on
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    ended = "wall"
    finally:
        if process.returncode is None:
            # The group holds the namespace's first process, with which the others end.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    status = process.returncode if process.returncode >= 0 else 128 - process.returncode
    if ended == "exit" and status == 128 + signal.SIGXCPU:
        ended = "cpu"
    text = output[: limits.output_bytes].decode("utf-8", errors="replace")
    return Outcome(text, status, ended)  # type: ignore[arg-type]
