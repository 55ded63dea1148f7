"""Runs commands in processes that cost no imports: a server that has done them forks for each.

Each child is a real `python -m launch.x`: own flags, own files, own exit status.
"""

import json
import os
import subprocess
import sys
import tempfile
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

    def __init__(self) -> None:
        env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
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

    def run(self, command: str, *arguments: str, file_limit: int = 0, stdin: str = "") -> Outcome:
        """Runs `python -m launch.<command> arguments`; no file may grow beyond `file_limit` bytes, if given."""
        assert self._server.stdin is not None and self._server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "in").write_text(stdin, encoding="utf-8", errors="surrogateescape")
            request = {
                "module": f"launch.{command}",
                "arguments": arguments,
                "folder": folder,
                "limit": file_limit,
            }
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            status = int(self._server.stdout.readline())
            texts = [
                Path(folder, name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err")
            ]
        return Outcome(status, *texts)


def serve() -> None:
    """Forks for each line of standard input and answers with the exit status."""
    import runpy

    import research.ablation.runner  # noqa: F401 - all that the commands import, but for their flags
    import research.train.chain  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child:
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        for number, (name, mode) in enumerate(
            [("in", os.O_RDONLY), ("out", os.O_WRONLY), ("err", os.O_WRONLY)]
        ):
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
