"""Hostile programs by kind. Each prints REACHED where it reached, or found, what it must not."""

from dataclasses import dataclass, field
from typing import Any

PREAMBLE = """
import ctypes, os, platform, resource, signal, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def attempt(action):
    try:
        got = action()
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        print('refused:', type(error).__name__, error)
    else:
        print('REACHED', got)
def checked(value):
    if value == -1:
        raise OSError(ctypes.get_errno(), 'refused')
    return value
def call(name, *arguments):
    return checked(libc[name](*arguments))
def syscall(x86_64, aarch64, *arguments):
    return checked(libc.syscall(x86_64 if platform.machine() == 'x86_64' else aarch64, *arguments))
"""


@dataclass(frozen=True)
class Attack:
    """One program, or one that leaves something and one that looks for it.

    Attributes:
      kind: what it goes for.
      name: unique.
      code: run after `PREAMBLE`.
      look: a second program, run after the first.
      ended: how the first must end; "fails" for an exit status other than 0.
      limits: of `SandboxLimits`.
      namespaces: only namespaces stop it: without them, it may read what the host's user may.
    """

    kind: str
    name: str
    code: str
    look: str = ""
    ended: str = "exit"
    limits: dict[str, Any] = field(default_factory=dict)
    namespaces: bool = False


_SHORT = {"wall_s": 2.0}
FILES = "('/tmp', '/var/tmp', '/dev/shm', '/run', '/var/spool/cron', '/var/spool/cron/crontabs', '/etc/cron.d', '.')"

EXHAUSTING = (
    # Processes that multiply, detach or ignore signals.
    Attack("processes", "fork_bomb", "while True: os.fork()", ended="fails"),
    Attack("processes", "daemon", "attempt(os.fork); attempt(lambda: os.posix_spawn('/bin/true', ['true'], {}))"),
    Attack("processes", "subprocess", "import subprocess; attempt(lambda: subprocess.Popen(['/bin/true']))"),
    Attack("processes", "thread", "import threading; attempt(lambda: threading.Thread(target=print).start())"),
    Attack(
        "processes",
        "raw_clone",
        "attempt(lambda: syscall(56, 220, 17, None, None, None, None))\n"
        "attempt(lambda: syscall(435, 435, ctypes.create_string_buffer(88), 88))",
    ),
    Attack(
        "processes",
        "ignores_every_signal",
        "for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(number, signal.SIG_IGN)\n"
        "signal.alarm(0); time.sleep(1000)",
        ended="wall",
        limits=_SHORT,
    ),
    Attack(
        "processes",
        "leaves_its_session",
        "if os.getsid(0) != os.getpid(): os.setsid()\ntime.sleep(1000)",
        ended="wall",
        limits=_SHORT,
    ),
    Attack("processes", "outlives_its_parent", "attempt(lambda: call('prctl', 1, 0, 0, 0, 0))"),
    Attack(
        "processes", "becomes_another", "os.execv('/bin/sh', ['sh', '-c', 'sleep 9 & echo REACHED'])", ended="fails"
    ),
    # Memory, disk, output and time without end.
    Attack("exhaustion", "memory", "held = []\nwhile True: held.append(bytearray(10_000_000))", ended="fails"),
    Attack("exhaustion", "mapped_memory", "import mmap; attempt(lambda: mmap.mmap(-1, 2**40))"),
    Attack(
        "exhaustion",
        "shared_segments",  # attached and filled one after another, they need no address space
        "libc.shmat.restype = ctypes.c_void_p\n"
        "def fill():\n"
        "    for _ in range(4):\n"
        "        segment = call('shmget', 0, ctypes.c_size_t(64 * 2**20), 0o1600)\n"
        "        address = libc.shmat(segment, None, 0)\n"
        "        ctypes.memset(address, 1, 64 * 2**20)\n"
        "        libc.shmdt(ctypes.c_void_p(address))\n"
        "    return 256 * 2**20\n"
        "attempt(fill)",
        limits={"memory_mb": 128},
    ),
    Attack(
        "exhaustion",
        "memory_files",
        "attempt(lambda: os.write(os.memfd_create('x'), b'x'))\nattempt(lambda: syscall(447, 447, 0))",
    ),
    Attack(
        "exhaustion",
        "buffers",  # of pipes and sockets
        "import fcntl\n"
        "def fill():\n"
        "    held = total = 0\n"
        "    pairs = []\n"
        "    try:\n"
        "        while True:\n"
        "            pairs.append(socket.socketpair() if len(pairs) % 2 else os.pipe())\n"
        "            for end in pairs[-1]:\n"
        "                try:\n"
        "                    if isinstance(end, int): fcntl.fcntl(end, 1031, 2**20)\n"
        "                    else: end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)\n"
        "                except OSError: pass\n"
        "                number = end if isinstance(end, int) else end.fileno()\n"
        "                os.set_blocking(number, False)\n"
        "                try:\n"
        "                    while True: total += os.write(number, bytes(4096))\n"
        "                except OSError: pass\n"
        "    except OSError: pass\n"
        "    if total < 8 * 2**20: raise MemoryError(total)\n"
        "    return total\n"
        "attempt(fill)",
    ),
    Attack(
        "exhaustion",
        "descriptors_in_flight",  # buffers that no longer count as open files
        "a, b = socket.socketpair()\nattempt(lambda: socket.send_fds(a, [b'x'], [0]))",
    ),
    Attack("exhaustion", "disk", "attempt(lambda: open('x', 'wb').write(bytes(10**6)))"),
    Attack("exhaustion", "names", f"for folder in {FILES}: attempt(lambda: os.mkdir(folder + '/sandbox-test-@HOST@'))"),
    Attack("exhaustion", "output", "while True: print('x' * 100)", ended="output"),
    Attack(
        "exhaustion", "output_of_one_line", "os.write(1, b'x' * 10**7)\nwhile True: os.write(2, b'y')", ended="output"
    ),
    Attack("exhaustion", "time", "9 ** 9 ** 9", ended="cpu", limits={"cpu_s": 1}),
    Attack(
        "exhaustion",
        "ignores_its_end",
        "signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        ended="fails",
        limits={"cpu_s": 1},
    ),
    Attack("exhaustion", "sleep", "os.close(1); os.close(2); time.sleep(1000)", ended="wall", limits=_SHORT),
    Attack(
        "exhaustion",
        "raises_its_limits",
        "for name in ('NPROC', 'AS', 'CPU', 'FSIZE', 'NOFILE'):\n"
        "    attempt(lambda: resource.setrlimit(getattr(resource, 'RLIMIT_' + name), (10**9, 10**9)))\n"
        "    attempt(lambda: resource.prlimit(os.getpid(), getattr(resource, 'RLIMIT_' + name), (10**9, 10**9)))",
    ),
    Attack("exhaustion", "inotify", "attempt(lambda: call('inotify_init1', 0))"),
)
