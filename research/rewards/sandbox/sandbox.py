"""Runs Python programs that nobody has read: each in a locked process of its own, that is gone afterwards."""

import marshal
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from research.core.errors import ConfigError
from research.rewards.sandbox.seccomp import KEYCTL, MACHINES, build_filter, call_number

Isolation = Literal["required", "best_effort"]

# Like -I, which is -E -P -s: the environment is empty but for what must be there, so -E would only take away
# the fixed hash seed, without which sets print in another order each time.
_OPTIONS = ("-P", "-s", "-S", "-B", "-u")
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache")  # shared libraries
_HERE = Path(__file__).parent
_NOBODY = 65534  # the kernel's own user for what belongs to nobody
_MOST_CODE = 100_000  # bytes; Linux takes 128 KiB as one argument


@dataclass(frozen=True)
class SandboxLimits:
    """What one program may use."""

    cpu_s: int = 5  # seconds of processor time, whole; the start of the interpreter (some 0.02 s) included
    memory_mb: int = 256  # MiB of address space (the bare interpreter takes 16)
    output_bytes: int = 20_000  # bytes that are read of what it prints; at the next one it is killed
    # seconds until it is killed. None: ten times `cpu_s` and ten more, so that whether a program that computes reaches
    # its end depends on the processor time it takes, not on what else the machine does
    wall_s: float | None = None

    @property
    def deadline_s(self) -> float:
        """Seconds of wall time until a program is killed."""
        return 10.0 * self.cpu_s + 10.0 if self.wall_s is None else self.wall_s


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    output: str  # standard output and error as they came, at most `output_bytes` of UTF-8
    status: int  # its exit status, 128 + n where signal n ended it
    # "exit", or the limit that it was killed at: "cpu" (processor time), "wall" (time), "output"
    ended: Literal["exit", "cpu", "wall", "output"]

    @property
    def last_line(self) -> str:
        """The last line of output that is not blank: an exception's, where one ended the program."""
        lines = [line for line in self.output.splitlines() if line.strip()]
        return lines[-1].strip() if lines else "nothing was printed"


@dataclass(frozen=True)
class Sandbox:
    """Runs Python programs on Linux (x86_64, aarch64); make it with `make_sandbox`, which tries the locks.

    A program has the standard library, an empty environment and standard input, one process and one thread, and
    limits on processor time, wall time, memory, open files and output. A filter of system calls (`seccomp.py`)
    refuses sockets, shared memory, message queues, keyrings, io_uring, ptrace and signals to other processes. It
    dies with the process that runs it. Randomness that it does not seed is seeded: equal programs print the same.

    With namespaces (Linux 5.12, and either root or unprivileged user namespaces) it also sees a read-only file
    system of system libraries and Python's standard library, no network, no other process, and has no capability;
    as root's child it runs as `nobody`.

    It does not protect against:
      - errors in the kernel, and side channels (timing, caches, access times of files that it may read);
      - use of the processor within the limits: as many programs at once as there are workers;
      - reading what is under /usr and in Python's own folder;
      - without namespaces: reading what the host's user (as root: nobody) may read, the environment and memory of
        the user's processes included. Use it only inside a container that holds nothing of value.
    """

    limits: SandboxLimits = SandboxLimits()
    namespaces: bool = True

    def run(self, code: str) -> Outcome:
        """Runs a program to its end, or to the end of its limits; OSError where the locks could not be put on."""
        if "\0" in code or len(code.encode()) > _MOST_CODE:
            raise ValueError(f"the code has a null character, or more than {_MOST_CODE} bytes")
        ready, ready_fd = os.pipe()
        try:
            with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
                os.chmod(folder, 0o755)  # nobody's working directory
                try:
                    process = self._start(folder, code, ready_fd)
                finally:
                    os.close(ready_fd)
                outcome = _watch(process, self.limits)
                said = os.read(ready, 4096)
        finally:
            os.close(ready)
        if said != b"1" and outcome.ended == "exit":
            raise OSError(f"the sandbox was not closed: {said[1:].decode() or outcome.last_line}")
        return outcome

    def _start(self, folder: str, code: str, ready_fd: int) -> "subprocess.Popen[bytes]":
        machine, python = os.uname().machine, os.path.realpath(sys.executable)
        spec = {  # see `confine.py`
            "python": python,
            "options": _OPTIONS,
            "environment": _ENVIRONMENT,
            "root": folder if self.namespaces else "",
            "visible": _visible(),
            "uid": _NOBODY if os.geteuid() == 0 else None,
            "host": os.getpid(),
            "cpu_s": self.limits.cpu_s,
            "memory_bytes": self.limits.memory_mb * 2**20,
            "filter": build_filter(machine, read_only=not self.namespaces),
            "keyctl": call_number(KEYCTL, machine),
            "ready_fd": ready_fd,
        }
        start = (_HERE / "start.py").read_text("utf-8")
        return subprocess.Popen(
            [python, *_OPTIONS, str(_HERE / "confine.py"), marshal.dumps(spec).hex(), start, code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=_ENVIRONMENT,
            pass_fds=(ready_fd,),
            start_new_session=True,
        )


def _watch(process: "subprocess.Popen[bytes]", limits: SandboxLimits) -> Outcome:
    """Reads until the end, the deadline or the output's limit; then nothing of the process is left."""
    assert process.stdout is not None
    deadline = time.monotonic() + limits.deadline_s
    output, ended = b"", "exit"
    try:
        with process.stdout as pipe:
            poll = select.poll()  # select takes no descriptor above 1023
            poll.register(pipe, select.POLLIN)
            read = b"?"
            while read and ended == "exit":
                if poll.poll(1000 * max(0.0, deadline - time.monotonic())):
                    read = os.read(pipe.fileno(), 65536)
                    output += read
                    ended = "output" if len(output) > limits.output_bytes else "exit"
                else:
                    ended = "wall"
            if ended == "exit":  # it may have closed its output and gone on
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


def make_sandbox(*, isolation: Isolation = "required") -> Sandbox:
    """A sandbox whose locks were tried on a first program; ConfigError where this machine cannot run it.

    Without namespaces, "required" refuses to work; "best_effort" warns and works.
    """
    system, machine = sys.platform, os.uname().machine
    if system != "linux" or machine not in MACHINES:
        raise ConfigError(f"python sandbox: got {system} on {machine}, expected linux on {' or '.join(MACHINES)}.")
    closed = _probe(namespaces=True)
    if not closed:
        return Sandbox()
    if isolation == "required":
        raise ConfigError(
            f"python sandbox: namespaces are not permitted here ({closed}), expected Linux 5.12, as root or with "
            "unprivileged user namespaces; or isolation='best_effort' in a container of its own."
        )
    if wrong := _probe(namespaces=False):
        raise ConfigError(f"python sandbox: {sys.executable} cannot run a program here ({wrong}).")
    warnings.warn(
        f"python sandbox: namespaces are not permitted here ({closed}); programs can read what this user can.",
        stacklevel=2,
    )
    return Sandbox(namespaces=False)


def _probe(*, namespaces: bool) -> str:
    """Why a first program does not run, or ""."""
    try:
        outcome = Sandbox(namespaces=namespaces).run("print(6 * 7)")
    except OSError as error:
        return str(error)
    return "" if outcome == Outcome("42\n", 0, "exit") else f"a first program gave {outcome}"


def _visible() -> tuple[str, ...]:
    paths = [path for path in _SYSTEM if os.path.lexists(path)]
    prefix = os.path.realpath(sys.base_prefix)
    return tuple(paths) if prefix == "/usr" or prefix.startswith("/usr/") else (*paths, prefix)
