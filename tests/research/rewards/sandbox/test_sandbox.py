"""What a program gets and how its end is told; programs that attack are in `test_hostile.py`."""

import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from research.core.errors import ConfigError
from research.rewards.sandbox.sandbox import Outcome, Sandbox, SandboxLimits, make_sandbox
from tests.research.rewards.sandbox.left import processes_with

MARK = f"SANDBOX_TEST_{os.getpid()}"  # in the text of every program, to find what is left of it
OUTPUT_BYTES = 4000


@pytest.fixture(scope="module")
def namespaces() -> bool:
    """Whether they are permitted; what needs them is skipped elsewhere."""
    return make_sandbox(isolation="best_effort").namespaces


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("sandboxes")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert not list(folder.iterdir())
    assert not processes_with(MARK)


@pytest.fixture
def run(namespaces):
    def run(code, **limits) -> Outcome:
        chosen = SandboxLimits(**{"output_bytes": OUTPUT_BYTES, "cpu_s": 20, **limits})
        return Sandbox(chosen, namespaces=namespaces).run(f"# {MARK}\n{code}")

    return run


def test_output_is_what_is_printed(run):
    code = "import sys\nprint('é', 2**70)\nprint('oh', file=sys.stderr)\nprint('end', end='')"
    assert run(code) == Outcome("é 1180591620717411303424\noh\nend", 0, "exit")


def test_the_standard_library_works(run):
    code = """
import asyncio, collections, dataclasses, datetime, decimal, fractions, itertools, json, math, pickle, re, statistics
@dataclasses.dataclass
class Point:
    x: int
async def later():
    await asyncio.sleep(0)
    return pickle.loads(pickle.dumps(Point(3)))
print(asyncio.run(later()), __name__)
print('unseen', file=open('/dev/null', 'r'))"""
    assert run(code).output.startswith("Point(x=3) __main__\n")


def test_a_program_is_the_main_module_alone(run):
    assert run("import sys\nprint(sys.argv, [name for name in dir() if name[0] != '_'])").output == "['-c'] ['sys']\n"


@pytest.mark.parametrize(
    "code",
    [
        "print({'a', 'b', 'c', 'd', 'e', 'f'})",
        "import random\nprint(random.random(), random.Random().random(), random.SystemRandom().random())",
        "import random\nrandom.seed()\nprint(random.sample(range(10**6), 5))",
        "import os, secrets, tempfile, uuid\nprint(os.urandom(8), secrets.token_hex(), uuid.uuid4())",
    ],
)
def test_the_same_program_prints_the_same(run, code):
    first, second = run(code), run(code)
    assert first == second and first.status == 0


def test_addresses_repeat(run):
    fixed = "import ctypes, sys; sys.exit(ctypes.CDLL(None).personality(0x0040000) < 0)"
    if subprocess.run([sys.executable, "-c", fixed]).returncode != 0:
        pytest.skip("address space randomisation cannot be turned off here")
    code = "print({object() for _ in range(9)}, print)"
    assert len({run(code).output for _ in range(3)}) == 1


def test_seeded_and_unseeded_generators_are_random(run):
    code = """
import random
assert len({random.Random().random() for _ in range(100)}) == 100
assert random.Random(7).random() == random.Random(7).random() != random.Random(8).random()
random.seed(3)
print(random.random())"""
    assert run(code).output == f"{random.Random(3).random()}\n"


def test_exceptions_and_statuses(run):
    outcome = run("print('before')\n1/0")
    assert (outcome.status, outcome.last_line) == (1, "ZeroDivisionError: division by zero")
    assert outcome.output.startswith('before\nTraceback (most recent call last):\n  File "<string>", line 3')
    assert outcome.output.count("File ") == 1  # the program's own frames alone
    assert run("1 +").last_line == "SyntaxError: invalid syntax"
    assert run("raise SystemExit(7)").status == 7
    assert run("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)").status == 137
    assert Outcome("\n", 0, "exit").last_line == "nothing was printed"


def test_time_is_counted_on_the_processor(run):
    outcome = run("print('start')\nwhile True: pass", cpu_s=1)
    assert (outcome.output, outcome.status, outcome.ended) == ("start\n", 128 + 24, "cpu")
    assert run("import time\ntime.sleep(1.5)\nprint('rested')", cpu_s=1).output == "rested\n"


def test_wall_time_ends_what_waits(run):
    start = time.monotonic()
    outcome = run("import time\nprint('start')\ntime.sleep(1000)", wall_s=1.0)
    assert (outcome.output, outcome.ended) == ("start\n", "wall")
    assert time.monotonic() - start >= 1


def test_output_is_cut_and_the_program_ended(run):
    assert run(f"print('x' * {OUTPUT_BYTES - 1})").ended == "exit"
    outcome = run(f"print('x' * {OUTPUT_BYTES})")
    assert outcome.ended == "output" and len(outcome.output) == OUTPUT_BYTES
    assert run(f"print('é' * {OUTPUT_BYTES})").output == "é" * (OUTPUT_BYTES // 2)


def test_devices(namespaces, run):
    if not namespaces:
        pytest.skip("without namespaces, nothing can be opened for writing")
    assert run("open('/dev/null', 'w').write('y')").status == 0
    assert run("import os\nprint(os.getcwd(), os.listdir('.'), os.getpid())").output == "/tmp [] 2\n"


def test_standard_input_is_empty(run):
    kept, (reading, writing) = os.dup(0), os.pipe()
    os.write(writing, b"typed into the host\n")
    os.dup2(reading, 0)
    try:
        assert "EOFError" in run("input()").output
        assert run("import sys\nprint(repr(sys.stdin.read()))").output == "''\n"
    finally:
        os.dup2(kept, 0)
        for descriptor in (kept, reading, writing):
            os.close(descriptor)


def test_many_at_once(run):
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda n: run(f"print({n})"), range(8)))
    assert outcomes == [Outcome(f"{n}\n", 0, "exit") for n in range(8)]


def test_a_host_with_many_open_files(run):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip("this machine allows fewer than 2048 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert run("print(1)").output == "1\n"
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_refusals(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="null character"):
        Sandbox().run("\0")
    with monkeypatch.context() as patched, pytest.raises(ConfigError, match="cannot run a program here"):
        patched.setattr(sys, "executable", str(tmp_path / "nothing"))
        make_sandbox(isolation="best_effort")
    with monkeypatch.context() as patched, pytest.raises(ConfigError, match="got darwin on .*, expected linux on"):
        patched.setattr(sys, "platform", "darwin")
        make_sandbox()
