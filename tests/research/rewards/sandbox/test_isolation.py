"""Hosts that are killed, and machines that cannot isolate."""

import os
import subprocess
import time

import pytest

from tests.research.rewards.sandbox.left import processes_with

MARK = f"ISOLATION_TEST_{os.getpid()}"
HOST = """
import sys
from research.rewards.sandbox.sandbox import Sandbox, SandboxLimits
code = "import ctypes, signal, time\\nsignal.alarm(0)\\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\\ntime.sleep(1000)"
Sandbox(SandboxLimits(wall_s=1000.0), namespaces=sys.argv[1] == "True").run("# @MARK@\\n" + code)
"""


def test_nothing_outlives_a_host_that_is_killed(tree, interpreter, user, namespaces):
    """Even where the program clears its alarm, and asks not to die with its parent."""
    host = [interpreter, "-", str(namespaces)]
    with subprocess.Popen(host, stdin=subprocess.PIPE, env={"PYTHONPATH": str(tree)}, cwd="/", **user) as process:
        process.stdin.write(HOST.replace("@MARK@", MARK).encode())
        process.stdin.close()
        while not any(b"\0-c\0" in line for line in processes_with(MARK, wait_s=0)):  # the program, every lock on
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    assert not processes_with(MARK)


WITHOUT_NAMESPACES = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(24, 21, 0, 0, 0)  # CAP_SYS_ADMIN is none that root can have: as in a container
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
"""
TRY_ALL = """
import warnings
from research.core.errors import ConfigError
from research.rewards.sandbox.sandbox import Sandbox, make_sandbox
try:
    make_sandbox()
except ConfigError as error:
    print(error)
try:
    print(Sandbox().run("print('free')"))
except OSError as error:
    print(error)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    sandbox = make_sandbox(isolation="best_effort")
print(sandbox.namespaces, sandbox.run("print(6 * 7)").output.strip(), [str(each.message) for each in caught])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take namespaces away from a process")
def test_a_machine_without_namespaces(tree, interpreter):
    """It is refused in one sentence, or worked without and said so; a sandbox that cannot be closed runs nothing."""
    done = subprocess.run(
        [interpreter, "-c", WITHOUT_NAMESPACES, TRY_ALL],
        capture_output=True,
        text=True,
        cwd="/",
        env={"PYTHONPATH": str(tree)},
    )
    assert done.returncode == 0, done.stderr
    refused, not_closed, best_effort = done.stdout.splitlines()
    why = "PermissionError: [Errno 1] unshare: Operation not permitted"
    assert refused == (
        f"python sandbox: namespaces are not permitted here (the sandbox was not closed: {why}), expected Linux 5.12, "
        "as root or with unprivileged user namespaces; or isolation='best_effort' in a container of its own."
    )
    assert not_closed == f"the sandbox was not closed: {why}"
    assert best_effort.startswith("False 42 ['python sandbox: namespaces are not permitted here (")
