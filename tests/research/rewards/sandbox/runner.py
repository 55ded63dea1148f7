"""Runs hostile programs as the user that starts it, and says what became of them and of the host.

    python runner.py NAMESPACES(0|1) < JSON of [{"codes": [...], "limits": {...}}, ...]

NAMESPACES and limits are those of `Sandbox`. A program's @HOST@ is this process's id, @FILE@ a file of it, @PORT@
and @SOCKET@ where it listens. Standard library and the sandbox only: an ordinary user may not see other packages.
"""

import ctypes
import json
import os
import platform
import socket
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path

from research.rewards.sandbox.sandbox import Sandbox, SandboxLimits

ADD_KEY, KEYCTL = {"x86_64": (248, 250), "aarch64": (217, 219)}[platform.machine()]
LIBC = ctypes.CDLL(None)
SECRET = b"hunter2"


def plant_key() -> int:
    """A key in a new session keyring of the host, 0 where the machine has no keys."""
    LIBC.syscall(KEYCTL, 1, None)
    key = LIBC.syscall(ADD_KEY, b"user", b"host-key", SECRET, ctypes.c_size_t(len(SECRET)), ctypes.c_long(-3))
    return max(0, key)


def is_whole(key: int) -> bool:
    """It is still there, and can be read."""
    read = ctypes.create_string_buffer(64)
    return not key or (LIBC.syscall(KEYCTL, 11, key, read, 64) == len(SECRET) and read.value == SECRET)


def keys() -> set[str]:
    """All keys that this process sees, each as the kernel describes it."""
    return set(Path("/proc/keys").read_text().splitlines()) if os.path.exists("/proc/keys") else set()


def main(namespaces: bool) -> None:
    jobs = json.load(sys.stdin)
    key = plant_key()
    with tempfile.TemporaryDirectory() as folder, socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        secret = Path(folder) / "secret"
        secret.write_bytes(SECRET)
        secret.chmod(0o666)
        os.chmod(folder, 0o777)
        tcp.bind(("127.0.0.1", 0))
        tcp.listen(64)
        unix.bind(f"\0sandbox-test-{os.getpid()}")
        unix.listen(64)
        names = {
            "@HOST@": str(os.getpid()),
            "@FILE@": str(secret),
            "@PORT@": str(tcp.getsockname()[1]),
            "@SOCKET@": f"sandbox-test-{os.getpid()}",
        }

        def run(job):
            sandbox = Sandbox(SandboxLimits(**job["limits"]), namespaces=namespaces)
            found = []
            for code in job["codes"]:
                for name, text in names.items():
                    code = code.replace(name, text)
                found.append(astuple(sandbox.run(code)))
            return found

        with ThreadPoolExecutor(4) as pool:
            outcomes = list(pool.map(run, jobs))
        host = {
            "file": secret.read_bytes().decode(),
            "folder": sorted(os.listdir(folder)),
            "host_key": is_whole(key),
            "planted_keys": [line for line in keys() if f"planted-{os.getpid()}" in line],
        }
    json.dump({"outcomes": outcomes, "host": host}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1] == "1")
