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
_FILES = "('/tmp', '/var/tmp', '/dev/shm', '/run', '/var/spool/cron', '/var/spool/cron/crontabs', '/etc/cron.d', '.')"

ATTACKS = (
    # Processes that multiply, detach or ignore signals.
    Attack("processes", "fork_bomb", "while True: os.fork()", ended="fails"),
    Attack(
        "processes", "daemon", "attempt(os.fork); attempt(lambda: os.posix_spawn('/bin/true', ['true'], {}))"
    ),
    Attack("processes", "subprocess", "import subprocess; attempt(lambda: subprocess.Popen(['/bin/true']))"),
    Attack(
        "processes", "thread", "import threading; attempt(lambda: threading.Thread(target=print).start())"
    ),
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
        "processes",
        "becomes_another",
        "os.execv('/bin/sh', ['sh', '-c', 'sleep 9 & echo REACHED'])",
        ended="fails",
    ),
    # Memory, disk, output and time without end.
    Attack(
        "exhaustion", "memory", "held = []\nwhile True: held.append(bytearray(10_000_000))", ended="fails"
    ),
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
    Attack(
        "exhaustion",
        "names",
        f"for folder in {_FILES}: attempt(lambda: os.mkdir(folder + '/sandbox-test-@HOST@'))",
    ),
    Attack("exhaustion", "output", "while True: print('x' * 100)", ended="output"),
    Attack(
        "exhaustion",
        "output_of_one_line",
        "os.write(1, b'x' * 10**7)\nwhile True: os.write(2, b'y')",
        ended="output",
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
    # The parent's memory, files, environment, descriptors, arguments; and power over it.
    Attack("parent", "memory", "attempt(lambda: open('/proc/@HOST@/mem', 'rb').read(0))", namespaces=True),
    Attack(
        "parent",
        "memory_by_call",
        "class Part(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('size', ctypes.c_size_t)]\n"
        "here = ctypes.create_string_buffer(8)\n"
        "mine, theirs = Part(ctypes.addressof(here), 8), Part(id(None), 8)\n"
        "for pid in (os.getppid(), @HOST@):\n"
        "    attempt(lambda: syscall(310, 270, pid, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0))",
    ),
    Attack("parent", "files", "attempt(lambda: open('@FILE@').read())", namespaces=True),
    Attack(
        "parent",
        "changes_its_files",
        "for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):\n"
        "    attempt(lambda: os.open('@FILE@', flags))\n"
        "other = '@FILE@' + '2'\n"
        "attempt(lambda: os.remove('@FILE@'))\n"
        "attempt(lambda: os.truncate('@FILE@', 0))\n"
        "attempt(lambda: os.chmod('@FILE@', 0o777))\n"
        "attempt(lambda: os.mkdir(other))\n"
        "for action in (os.rename, os.link, os.symlink): attempt(lambda: action('@FILE@', other))",
    ),
    Attack(
        "parent",
        "environment",
        "attempt(lambda: open('/proc/@HOST@/environ').read())\nattempt(lambda: open('/proc/self/environ').read())",
        namespaces=True,
    ),
    Attack(
        "parent",
        "inherited_environment",
        "'API_TOKEN' in os.environ and print('REACHED', os.environ['API_TOKEN'])",
    ),
    Attack(
        "parent",
        "arguments",
        "attempt(lambda: open(f'/proc/{os.getppid()}/cmdline').read())\nattempt(lambda: os.listdir('/proc'))",
        namespaces=True,
    ),
    Attack("parent", "descriptors", "for number in range(3, 64): attempt(lambda: os.fstat(number))"),
    Attack(
        "parent", "standard_input", "attempt(input) if sys.stdin.read() else attempt(lambda: int('empty'))"
    ),
    Attack(
        "parent",
        "ptrace",
        "for pid in (os.getppid(), @HOST@):\n"
        "    attempt(lambda: call('ptrace', 16, pid, None, None))\n"
        "    attempt(lambda: call('ptrace', 0x4206, pid, None, None))",
    ),
    Attack(
        "parent",
        "signals",
        "import fcntl\n"
        "for pid in (@HOST@, -@HOST@, 0, -1):\n"
        "    attempt(lambda: os.kill(pid, 0))\n"
        "attempt(lambda: syscall(234, 131, @HOST@, @HOST@, 0))\n"
        "attempt(lambda: fcntl.fcntl(1, fcntl.F_SETOWN, @HOST@))",
    ),
    Attack(
        "parent",
        "process_descriptors",
        "def steal():\n"
        "    process = syscall(434, 434, @HOST@, 0)\n"
        "    return syscall(438, 438, process, 1, 0)\n"
        "attempt(steal)\nattempt(lambda: syscall(434, 434, os.getpid(), 0))",
    ),
    Attack(
        "parent",
        "its_limits_and_priority",
        "attempt(lambda: resource.prlimit(@HOST@, resource.RLIMIT_NOFILE))\n"
        "attempt(lambda: os.setpriority(os.PRIO_PROCESS, @HOST@, 19))\n"
        "attempt(lambda: os.sched_setaffinity(@HOST@, {0}))",
    ),
    Attack(
        "parent",
        "namespaces_and_mounts",
        "attempt(lambda: call('unshare', 0x10000000))\n"
        "attempt(lambda: call('mount', b'tmpfs', b'/tmp', b'tmpfs', 0, None))\n"
        "attempt(lambda: call('umount2', b'/usr', 2))\n"
        "attempt(lambda: os.chroot('/tmp'))",
    ),
    Attack(
        "parent",
        "becomes_root",
        "attempt(lambda: os.setuid(0) if os.getuid() else os.setuid(1))\nattempt(lambda: os.setgroups([0]))",
    ),
    Attack("parent", "io_uring", "attempt(lambda: syscall(425, 425, 8, ctypes.create_string_buffer(120)))"),
    Attack("parent", "kernel_log", "attempt(lambda: syscall(103, 116, 10, None, 0))"),
    Attack("parent", "other_architecture", "attempt(lambda: checked(libc.syscall(0x40000000 | 39)))"),
    # Sockets of every family.
    Attack(
        "sockets",
        "every_family",
        "for family in range(46):\n"
        "    for kind in (1, 2, 3, 5):\n"
        "        attempt(lambda: socket.socket(family, kind))",
    ),
    Attack("sockets", "tcp", "attempt(lambda: socket.create_connection(('127.0.0.1', @PORT@), timeout=2))"),
    Attack("sockets", "vsock", "attempt(lambda: socket.socket(40, socket.SOCK_STREAM))"),
    Attack("sockets", "abstract", "attempt(lambda: socket.socket(socket.AF_UNIX).connect('\\0@SOCKET@'))"),
    Attack(
        "sockets", "pair_that_sends_elsewhere", "attempt(lambda: socket.socketpair(type=socket.SOCK_DGRAM))"
    ),
    Attack(
        "sockets",
        "pair_with_a_name",
        "attempt(lambda: socket.socketpair()[0].bind('\\0sandbox-test-pair-@HOST@'))",
    ),
    # State left for later.
    Attack(
        "state",
        "session_key_of_the_host",
        "key = ctypes.create_string_buffer(64)\n"
        "def read():\n"
        "    found = syscall(250, 219, 10, ctypes.c_long(-3), b'user', b'host-key', 0)\n"
        "    syscall(250, 219, 11, found, key, 64)\n"
        "    syscall(250, 219, 3, found)\n"
        "    return key.value\n"
        "attempt(read)\nattempt(lambda: syscall(249, 218, b'user', b'host-key', None, ctypes.c_long(-3)))",
    ),
    Attack(
        "state",
        "keys",
        "for ring in (-1, -2, -3, -4, -5):\n"
        "    attempt(lambda: syscall(248, 217, b'user', b'planted-@HOST@', b'x', ctypes.c_long(1), ctypes.c_long(ring)))",
        "for ring in (-3, -4, -5):\n"
        "    attempt(lambda: syscall(250, 219, 10, ctypes.c_long(ring), b'user', b'planted-@HOST@', 0))",
    ),
    Attack(
        "state",
        "shared_memory",
        "attempt(lambda: call('shmget', 4242, ctypes.c_size_t(4096), 0o1666))",
        "attempt(lambda: call('shmget', 4242, ctypes.c_size_t(4096), 0o666))",
    ),
    Attack(
        "state",
        "semaphores",
        "attempt(lambda: call('semget', 4242, 1, 0o1666))",
        "attempt(lambda: call('semget', 4242, 1, 0o666))",
    ),
    Attack(
        "state",
        "message_queues",
        "attempt(lambda: call('msgget', 4242, 0o1666))",
        "attempt(lambda: call('msgget', 4242, 0o666))",
    ),
    Attack(
        "state",
        "posix_message_queues",
        "attempt(lambda: syscall(240, 180, b'planted-@HOST@', 0o102, 0o666, None))",
        "attempt(lambda: syscall(240, 180, b'planted-@HOST@', 2, 0, None))",
    ),
    Attack(
        "state",
        "files",
        f"for folder in {_FILES}: attempt(lambda: os.open(folder + '/sandbox-test-@HOST@', os.O_CREAT | os.O_WRONLY))",
        f"for folder in {_FILES}: attempt(lambda: os.stat(folder + '/sandbox-test-@HOST@'))",
    ),
    Attack(
        "state",
        "marks_on_files",
        "attempt(lambda: os.utime('/dev/null', (1, 1)))\n"
        "attempt(lambda: os.setxattr(os.__file__, 'user.planted-@HOST@', b'x'))\n"
        "attempt(lambda: os.chmod('/dev/null', 0o666))",
        "attempt(lambda: os.getxattr(os.__file__, 'user.planted-@HOST@'))",
    ),
    Attack(
        "state",
        "abstract_socket",
        "attempt(lambda: socket.socket(socket.AF_UNIX).bind('\\0planted-@HOST@'))",
        "attempt(lambda: socket.socket(socket.AF_UNIX).connect('\\0planted-@HOST@'))",
    ),
    Attack(
        "state",
        "timers",
        "signal.setitimer(signal.ITIMER_REAL, 1)\nattempt(lambda: os.execv('/usr/bin/at', ['at', 'now']))\n"
        "attempt(lambda: open('/etc/crontab', 'a'))",
    ),
    # Forged ends and output.
    Attack("forged", "ends_early", "os._exit(0)\nprint('REACHED')"),
    Attack(
        "forged",
        "writes_to_the_host",  # the descriptors that a report could go through
        "for number in range(3, 64): attempt(lambda: os.write(number, b'1'))\nos._exit(1)",
        ended="fails",
    ),
    Attack(
        "forged",
        "patched_end",
        "sys.excepthook = lambda *_: None\nraise SystemError('hidden')",
        ended="fails",
    ),
)
