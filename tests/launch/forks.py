"""Runs commands in processes that cost no imports: a server that has done them forks for each.

Each child is a real `python -m launch.x`: own flags, own files, own exit status.
"""

import glob
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Outcome(NamedTuple):
    """What a command left."""

    status: int
    stdout: str
    stderr: str


class Forks:
    """A context manager around the server; one device, XLA without its optimisations."""

    def __init__(self, cache: Path | None = None) -> None:
        """Commands share compiled programs in the folder `cache`, if given."""
        env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        if cache is not None:
            env |= {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": str(cache)}
            env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.launch.forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=env,
            text=True,
        )

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *exc: Any) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)

    def run(
        self,
        command: str,
        *arguments: str,
        file_limit: int = 0,
        stdin: str = "",
        signals: Sequence[tuple[int, Path, int]] = (),
    ) -> Outcome:
        """Runs `python -m launch.<command> arguments`.

        Args:
          command, arguments: what is run.
          file_limit: no file may grow beyond so many bytes, if given.
          stdin: what it reads.
          signals: sent one after the other, each (number, pattern of a file, lines that this must have by then).
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "in").write_text(stdin, encoding="utf-8", errors="surrogateescape")
            request = {
                "module": f"launch.{command}",
                "arguments": arguments,
                "folder": folder,
                "limit": file_limit,
                "signals": [(number, str(path), lines) for number, path, lines in signals],
            }
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            status = int(self._server.stdout.readline())
            texts = [Path(folder, name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err")]
        return Outcome(status, *texts)


def wait_for(child: int, signals: list[tuple[int, str, int]]) -> int:
    """The child's exit status; sends it each signal when its file has come so far."""
    for number, pattern, lines in signals:
        while not any(Path(path).read_bytes().count(b"\n") >= lines for path in glob.glob(pattern)):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def serve() -> None:
    """Forks for each line of standard input and answers with the exit status."""
    import runpy

    import research.ablation.runner  # noqa: F401 - all that the commands import, but for their flags
    import research.train.chain  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child:
            print(wait_for(child, request["signals"]), flush=True)
            continue
        for number, (name, mode) in enumerate([("in", os.O_RDONLY), ("out", os.O_WRONLY), ("err", os.O_WRONLY)]):
            os.dup2(os.open(Path(request["folder"], name), mode | os.O_CREAT), number)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - lives as long as the child
        sys.argv = [request["module"], *request["arguments"]]
        if request["limit"]:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
        code = 0
        try:
            runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:  # noqa: BLE001 - as the interpreter would
            import traceback

            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
