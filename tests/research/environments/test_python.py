"""Programs that nobody has read: each of these would hurt a host that ran them without locks."""

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from research.core.errors import ConfigError
from research.environments.base import Toolbox
from research.environments.calls import Call
from research.environments.python import Outcome, Sandbox, SandboxLimits, python

LIMITS = SandboxLimits(wall_s=60.0, cpu_s=20, output_bytes=4000)
MARK = f"SANDBOX_TEST_{os.getpid()}"  # in the code of every program, to find what is left of it


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    """With namespaces where they are permitted; what needs them is skipped elsewhere."""
    return Sandbox(LIMITS, isolation="best_effort")


@pytest.fixture
def isolated(sandbox) -> Sandbox:
    if not sandbox.namespaces:
        pytest.skip("namespaces are not permitted here")
    return sandbox


def limited(sandbox, **limits) -> Sandbox:
    made = object.__new__(Sandbox)  # without trying the locks again
    made.__dict__.update(sandbox.__dict__, limits=SandboxLimits(**{**LIMITS.__dict__, **limits}))
    return made


def descendants() -> list[bytes]:
    """Command lines of the sandboxes' processes."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it has just ended
        if MARK.encode() in line:
            found.append(line)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("sandboxes")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert not list(folder.iterdir())
    deadline = time.monotonic() + 30
    while descendants() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not descendants()


def run(sandbox, code) -> Outcome:
    return sandbox.run(f"# {MARK}\n{code}")


def test_output_is_what_is_printed(sandbox):
    code = "import sys\nprint('é', 2**70)\nprint('oh', file=sys.stderr)\nprint('end', end='')"
    assert run(sandbox, code) == Outcome("é 1180591620717411303424\noh\nend", 0, "exit")


def test_the_standard_library_works(sandbox):
    code = "import collections, datetime, decimal, fractions, itertools, json, math, random, re, statistics\nprint(1)"
    assert run(sandbox, code).output == "1\n"


def test_the_same_program_prints_the_same(sandbox):
    outcomes = {run(sandbox, "print({'a', 'b', 'c', 'd', 'e', 'f'})").output for _ in range(3)}
    assert len(outcomes) == 1


def test_exceptions_and_statuses(sandbox):
    outcome = run(sandbox, "print('before')\n1/0")
    assert outcome.status == 1 and outcome.output.startswith("before\nTraceback")
    assert run(sandbox, "raise SystemExit(7)").status == 7
    assert run(sandbox, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)").status == 137


def test_infinite_loop_ends_by_processor_time(sandbox):
    outcome = run(limited(sandbox, cpu_s=1), "print('start')\nwhile True: pass")
    assert (outcome.output, outcome.status, outcome.ended) == ("start\n", 128 + 24, "exit")


@pytest.mark.parametrize(
    "code",
    [
        "time.sleep(1000)",
        "os.close(1); os.close(2); time.sleep(1000)",
        "os.getpgrp() == os.getpid() or os.setsid(); time.sleep(1000)",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.alarm(0); time.sleep(1000)",
    ],
)
def test_sleeping_ends_by_wall_time(sandbox, code):
    start = time.monotonic()
    outcome = run(limited(sandbox, wall_s=3.0), f"import os, signal, time\nprint('start')\n{code}")
    assert (outcome.output, outcome.ended) == ("start\n", "time")
    assert 3 <= time.monotonic() - start < 30


def test_memory_bomb(sandbox):
    outcome = run(sandbox, "held = []\nwhile True: held.append(bytearray(10_000_000))")
    assert outcome.status == 1 and outcome.output.endswith("MemoryError\n")
    assert run(sandbox, "print(len('x' * 10**12))").output.endswith("MemoryError\n")


@pytest.mark.parametrize(
    "code",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['/usr/bin/true'])",
        "import threading\nthreading.Thread(target=print).start()",
        "import multiprocessing\nmultiprocessing.get_context('fork').Process(target=print).start()",
    ],
)
def test_fork_bomb(sandbox, code):
    outcome = run(sandbox, code)
    assert outcome.status == 1 and (
        "BlockingIOError" in outcome.output or "can't start new" in outcome.output
    )


def test_limits_cannot_be_raised(sandbox):
    for name in ("NPROC", "AS", "CPU", "FSIZE"):
        outcome = run(sandbox, f"import resource as r\nr.setrlimit(r.RLIMIT_{name}, (10**9, 10**9))")
        assert outcome.output.endswith("not allowed to raise maximum limit\n")


def test_huge_output_is_cut_and_the_program_ended(sandbox):
    outcome = run(sandbox, "while True: print('x' * 100)")
    assert outcome.ended == "output" and len(outcome.output) == LIMITS.output_bytes
    assert run(sandbox, "print('x' * 3999)").ended == "exit"
    assert run(sandbox, "print('x' * 4000)").ended == "output"
    assert run(sandbox, "print('é' * 4000)").output == "é" * 2000


def test_files_cannot_be_written(sandbox, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("precious")
    kept.chmod(0o666)
    tmp_path.chmod(0o777)
    for path in ("x", "/tmp/x", str(kept)):
        code = f"import os\nos.write(os.open({path!r}, os.O_CREAT | os.O_WRONLY | os.O_APPEND), b'y')"
        outcome = run(sandbox, code)
        assert outcome.status == 1 and "Error" in outcome.output.splitlines()[-1]
    assert kept.read_text() == "precious"
    assert run(sandbox, "open('/dev/null', 'w').write('y')").status == 0


def test_files_can_neither_be_seen_nor_removed(isolated, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("precious")
    kept.chmod(0o666)
    for action in (f"os.remove({str(kept)!r})", f"open({str(kept)!r})", f"open({str(kept)!r}, 'w')"):
        assert "FileNotFoundError" in run(isolated, f"import os\n{action}").output
    for path in ("/etc/passwd", "/proc/self/environ", "/sys", "/home", "/var"):
        assert run(isolated, f"import os\nprint(os.path.exists({path!r}))").output == "False\n"
    assert "Read-only file system" in run(isolated, "open('/tmp/empty', 'w')").output
    assert "Read-only file system" in run(isolated, "open('/usr/empty', 'w')").output
    assert run(isolated, "import os\nprint(os.getcwd(), os.listdir('.'))").output == "/tmp []\n"
    assert kept.read_text() == "precious"


def test_the_environment_holds_no_secrets(sandbox, monkeypatch):
    monkeypatch.setenv("API_TOKEN", "hunter2")
    assert run(sandbox, "import os\nprint(set(os.environ) - {'LC_CTYPE'})").output in (
        "{'PYTHONHASHSEED', 'PYTHONUTF8'}\n",
        "{'PYTHONUTF8', 'PYTHONHASHSEED'}\n",
    )


def test_other_processes_cannot_be_read_or_reached(isolated, monkeypatch):
    monkeypatch.setenv("API_TOKEN", "hunter2")
    host = os.getpid()
    code = f"""
import os
for pid in (os.getppid(), {host}):
    for action in (lambda: open(f'/proc/{{pid}}/environ').read(), lambda: os.kill(pid, 9)):
        try:
            print('got', action())
        except OSError as error:
            print('no', type(error).__name__)
print(os.getpid())"""
    lines = run(isolated, code).output.splitlines()
    assert lines[0] == lines[2] == "no FileNotFoundError" and lines[3] == "no ProcessLookupError"
    assert lines[1] in ("no PermissionError", "got None")  # the namespace's first process does not hear it
    assert lines[4] == "2"


def test_there_is_no_network(isolated):
    code = """
import socket
for address in (('127.0.0.1', 22), ('10.0.0.1', 80)):
    try:
        socket.create_connection(address, timeout=2)
    except OSError as error:
        print(error.errno)"""
    assert run(isolated, code).output == "101\n101\n"  # ENETUNREACH: not even a loopback


def test_capabilities_are_gone(isolated):
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for call in (
    lambda: libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None),
    lambda: libc.umount(b'/usr'),
    lambda: libc.chroot(b'/tmp'),
    lambda: libc.unshare(0x10000000),
):
    print(call(), end=' ')"""
    assert run(isolated, code).output == "-1 -1 -1 -1 "


def test_standard_input_is_empty(sandbox):
    kept, (reading, writing) = os.dup(0), os.pipe()
    os.write(writing, b"typed into the host\n")
    os.dup2(reading, 0)
    try:
        assert "EOFError" in run(sandbox, "input()").output
        assert run(sandbox, "import sys\nprint(repr(sys.stdin.read()))").output == "''\n"
    finally:
        os.dup2(kept, 0)
        for descriptor in (kept, reading, writing):
            os.close(descriptor)


def test_many_at_once(sandbox):
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda n: run(sandbox, f"print({n})"), range(8)))
    assert outcomes == [Outcome(f"{n}\n", 0, "exit") for n in range(8)]


def test_nothing_outlives_a_host_that_is_killed(tmp_path):
    host = f"""
from research.environments.python import Sandbox, SandboxLimits
sandbox = Sandbox(SandboxLimits(wall_s=2.0), isolation="best_effort")
sandbox.run("# {MARK}\\nimport time; time.sleep(1000)")
"""
    # The code is not in the host's own command line, so that only the program is counted.
    script = tmp_path / "host.py"
    script.write_text(host)
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, str(script)], env=environment) as process:
        deadline = time.monotonic() + 60
        while not any(b"-c\0# " in line for line in descendants()):  # the program itself, every lock on
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
    # That they end is asserted after every test.


def test_as_a_tool(sandbox, tokenizer):
    def answer(code, **limits):
        box = Toolbox([python(limited(sandbox, **limits))], tokenizer, max_result_tokens=80)
        result = box.run(Call("python", {"code": f"# {MARK}\n{code}"}))
        return result.error, result.text

    assert answer("print(6*7)") == (None, "42\n")
    assert answer("x = 1") == (None, "(no output)")
    error, text = answer("print('hi')\n1/0")
    assert error == "tool" and text.startswith(
        "error: python: status 1: ZeroDivisionError: division by zero\nhi"
    )
    assert answer("raise SystemExit(3)") == ("tool", "error: python: status 3: nothing was printed")
    assert answer("print(1)\nwhile True: pass", cpu_s=1) == (
        "timeout",
        "error: python: stopped after 1 seconds of processor time\n1\n",
    )
    assert answer("import time\ntime.sleep(99)", wall_s=1.0) == (
        "timeout",
        "error: python: stopped after 1 seconds",
    )
    error, text = answer("while True: print('x')", output_bytes=10)
    assert (error, text) == ("tool", "error: python: stopped after 10 bytes of output\nx\nx\nx\nx\nx\n")
    assert answer("\0") == ("tool", "error: python: the code has a null character, or more than 100000 bytes")
    assert answer("#" * 100_000)[0] == "tool"


def test_refusals(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="python sandbox: cpu_s: got 0, expected >= 1"):
        SandboxLimits(cpu_s=0)
    with monkeypatch.context() as patched, pytest.raises(ConfigError, match="cannot run a program here"):
        patched.setattr("research.environments.python.sys.executable", str(tmp_path / "nothing"))
        Sandbox(isolation="best_effort")
    monkeypatch.setattr("research.environments.python.shutil.which", lambda _: None)
    with pytest.raises(
        ConfigError, match=r"namespaces are not permitted here \(the command unshare .* is missing\)"
    ):
        Sandbox()


def test_a_sandbox_that_cannot_be_closed_runs_nothing(isolated, monkeypatch):
    """As where a container's security profile forbids mounts: an error, never a program without locks."""
    monkeypatch.setattr("research.environments.python._NAMESPACES", ("--user", "--fork"))
    with pytest.raises(OSError, match="the sandbox was not closed"):
        run(isolated, "print('free')")
