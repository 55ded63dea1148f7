"""A Python tool: each program runs in a locked process of its own, that is gone afterwards."""

import json
import os
import pwd
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from research.core.errors import ConfigError
from research.environments.base import Tool, ToolError, ToolTimeout

Isolation = Literal["required", "best_effort"]

# Like -I, which is -E -P -s: the environment is empty but for what must be there, so -E would only take away
# the fixed hash seed, without which sets print in another order each time.
_OPTIONS = ("-P", "-s", "-S", "-B", "-u")
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache")  # shared libraries
_MOST_CODE = 100_000  # bytes; Linux takes 128 KiB as one argument
_NAMESPACES = ("--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child")


@dataclass(frozen=True)
class SandboxLimits:
    """What one program may use.

    Attributes:
      wall_s: seconds until it is killed, the start of two interpreters (some 0.1 s) included.
      cpu_s: seconds of processor time, whole.
      memory_mb: MiB of address space (the bare interpreter takes 11).
      output_bytes: bytes that are read of what it prints; at the next one it is killed.
    """

    wall_s: float = 5.0
    cpu_s: int = 5
    memory_mb: int = 256
    output_bytes: int = 20_000

    def __post_init__(self) -> None:
        """Checks the ranges."""
        least = {"wall_s": 0.1, "cpu_s": 1, "memory_mb": 64, "output_bytes": 1}
        for name, bound in least.items():
            value = asdict(self)[name]
            if value < bound:
                raise ConfigError(f"python sandbox: {name}: got {value}, expected >= {bound}.")


@dataclass(frozen=True)
class Confinement:
    """What `confine.py` is told; `root` is "" without namespaces, `uid` None where there is no root to leave."""

    python: str
    options: tuple[str, ...]
    environment: Mapping[str, str]
    root: str
    visible: tuple[str, ...]
    uid: int | None
    cpu_s: int
    memory_bytes: int
    wall_s: float
    ready_fd: int


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
      output: standard output and error as they came, at most `output_bytes` of UTF-8.
      status: its exit status, 128 + n where signal n ended it.
      ended: "exit", or what it was killed for.
    """

    output: str
    status: int
    ended: Literal["exit", "time", "output"]


class Sandbox:
    """Runs Python programs that nobody has read.

    With namespaces (Linux 5.12, and either root or unprivileged user namespaces) a program sees a read-only file
    system of system libraries and Python's standard library, no network (not even the host's loopback), no other
    process, and no capability; as root's child it runs as `nobody`. With and without namespaces: standard library
    only, an empty environment and standard input, limits on processor time, wall time, memory, open files and
    output, no file of more than 0 bytes, no further process or thread.

    It does not protect against:
      - errors in the kernel, and side channels (timing, caches);
      - use of the processor within the limits: as many programs at once as there are workers;
      - memory that is no address space (pipes, System V segments), which counts against no limit while it runs;
      - reading what is under /usr and in Python's own folder;
      - without namespaces (`isolation="best_effort"` where they are not permitted, see `namespaces`): the network,
        and all that the host's user (as root: nobody) may do: read files and the environment of the user's
        processes, empty or remove files, send signals. Use it only inside a container that holds nothing of value.
    """

    def __init__(self, limits: SandboxLimits | None = None, *, isolation: Isolation = "required") -> None:
        """Tries the locks on a first program.

        Args:
          limits: of each program.
          isolation: "required" refuses to work without namespaces.

        Raises:
          ConfigError: this machine cannot run a program, or not with the isolation that is required.
        """
        self.limits = limits or SandboxLimits()
        self.namespaces = True
        self._python = os.path.realpath(sys.executable)
        wrong = self._probe()
        if wrong and isolation == "required":
            raise ConfigError(
                f"python sandbox: namespaces are not permitted here ({wrong}), expected Linux 5.12 with unshare, as "
                "root or with unprivileged user namespaces; or isolation='best_effort' in a container of its own."
            )
        if wrong:
            self.namespaces = False
            wrong = self._probe()
        if wrong:
            raise ConfigError(f"python sandbox: {self._python} cannot run a program here ({wrong}).")

    def _probe(self) -> str:
        """Why a first program does not run, or ""."""
        try:
            outcome = self._run("print(6 * 7)", SandboxLimits(wall_s=30.0))
        except OSError as error:
            return str(error)
        return "" if outcome == Outcome("42\n", 0, "exit") else f"a first program gave {outcome}"

    def run(self, code: str) -> Outcome:
        """Runs a program to its end, or to the end of its limits.

        Raises:
          ValueError: the code is too long, or holds a null character.
          OSError: the locks could not be put on.
        """
        return self._run(code, self.limits)

    def _run(self, code: str, limits: SandboxLimits) -> Outcome:
        if "\0" in code or len(code.encode()) > _MOST_CODE:
            raise ValueError(f"the code has a null character, or more than {_MOST_CODE} bytes")
        ready, ready_fd = os.pipe()
        try:
            with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
                os.chmod(folder, 0o755)  # nobody's working directory
                try:
                    process = self._start(folder, code, ready_fd, limits)
                finally:
                    os.close(ready_fd)
                outcome = _watch(process, limits)
                said = os.read(ready, 4096)
        finally:
            os.close(ready)
        if said != b"1" and outcome.ended == "exit":
            raise OSError(f"the sandbox was not closed: {said[1:].decode() or _last_line(outcome.output)}")
        return outcome

    def _start(
        self, folder: str, code: str, ready_fd: int, limits: SandboxLimits
    ) -> "subprocess.Popen[bytes]":
        root = os.geteuid() == 0
        prefix = []
        if self.namespaces:
            unshare = shutil.which("unshare")
            if unshare is None:
                raise OSError("the command unshare (util-linux) is missing")
            prefix = [unshare, *([] if root else ["--user", "--map-root-user"]), *_NAMESPACES, "--"]
        spec = Confinement(
            python=self._python,
            options=_OPTIONS,
            environment=_ENVIRONMENT,
            root=folder if self.namespaces else "",
            visible=_visible(),
            uid=_nobody() if root else None,
            cpu_s=limits.cpu_s,
            memory_bytes=limits.memory_mb * 2**20,
            wall_s=limits.wall_s,
            ready_fd=ready_fd,
        )
        script = str(Path(__file__).with_name("confine.py"))
        return subprocess.Popen(
            [*prefix, self._python, *_OPTIONS, script, json.dumps(asdict(spec)), code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=dict(_ENVIRONMENT),
            pass_fds=(ready_fd,),
            start_new_session=True,
        )


def _visible() -> tuple[str, ...]:
    paths = [path for path in _SYSTEM if os.path.lexists(path)]
    prefix = os.path.realpath(sys.base_prefix)
    return tuple(paths) if prefix == "/usr" or prefix.startswith("/usr/") else (*paths, prefix)


def _nobody() -> int:
    try:
        return pwd.getpwnam("nobody").pw_uid
    except KeyError:
        return 65534


def _watch(process: "subprocess.Popen[bytes]", limits: SandboxLimits) -> Outcome:
    """Reads until the end, the deadline or the output's limit; then nothing of the process is left."""
    assert process.stdout is not None
    deadline = time.monotonic() + limits.wall_s
    output, ended = b"", "exit"
    try:
        with process.stdout as pipe:
            while True:
                readable, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
                if not readable:
                    ended = "time"
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
                    ended = "time"
    finally:
        if process.returncode is None:
            # The group holds unshare and the namespace's first process, with which the others end.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    status = process.returncode if process.returncode >= 0 else 128 - process.returncode
    text = output[: limits.output_bytes].decode("utf-8", errors="replace")
    return Outcome(text, status, ended)  # type: ignore[arg-type]


def python(sandbox: Sandbox) -> Tool:
    """The tool "python": prints what the program prints."""
    limits = sandbox.limits

    def run(arguments: Mapping[str, Any]) -> str:
        try:
            outcome = sandbox.run(arguments["code"])
        except ValueError as error:
            raise ToolError(str(error)) from error
        shown = f"\n{outcome.output}" if outcome.output else ""
        if outcome.ended == "time":
            raise ToolTimeout(f"stopped after {limits.wall_s:g} seconds{shown}")
        if outcome.ended == "output":
            raise ToolError(f"stopped after {limits.output_bytes} bytes of output{shown}")
        if outcome.status == 128 + signal.SIGXCPU:
            raise ToolTimeout(f"stopped after {limits.cpu_s} seconds of processor time{shown}")
        if outcome.status:
            # The line that matters comes first: a long traceback may be cut.
            raise ToolError(f"status {outcome.status}: {_last_line(outcome.output)}{shown}")
        return outcome.output

    return Tool(
        name="python",
        description=f"Runs a Python program (standard library only, {limits.wall_s:g} seconds) and shows its output.",
        parameters={
            "type": "object",
            "properties": {
                "code": {"type": "string", "description": "the program; print what is to be seen"}
            },
            "required": ["code"],
            "additionalProperties": False,
        },
        run=run,
    )


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "nothing was printed"
