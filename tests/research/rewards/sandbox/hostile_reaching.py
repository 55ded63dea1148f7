"""Hostile programs that go for the host, or leave something for a later program, or forge their end."""

from tests.research.rewards.sandbox.hostile import FILES, Attack

REACHING = (
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
        "parent", "inherited_environment", "'API_TOKEN' in os.environ and print('REACHED', os.environ['API_TOKEN'])"
    ),
    Attack(
        "parent",
        "arguments",
        "attempt(lambda: open(f'/proc/{os.getppid()}/cmdline').read())\nattempt(lambda: os.listdir('/proc'))",
        namespaces=True,
    ),
    Attack("parent", "descriptors", "for number in range(3, 64): attempt(lambda: os.fstat(number))"),
    Attack("parent", "standard_input", "attempt(input) if sys.stdin.read() else attempt(lambda: int('empty'))"),
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
        "attempt(steal)",
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
        "for family in range(46):\n    for kind in (1, 2, 3, 5): attempt(lambda: socket.socket(family, kind))",
    ),
    Attack("sockets", "tcp", "attempt(lambda: socket.create_connection(('127.0.0.1', @PORT@), timeout=2))"),
    Attack("sockets", "vsock", "attempt(lambda: socket.socket(40, socket.SOCK_STREAM))"),
    Attack("sockets", "abstract", "attempt(lambda: socket.socket(socket.AF_UNIX).connect('\\0@SOCKET@'))"),
    Attack("sockets", "pair_that_sends_elsewhere", "attempt(lambda: socket.socketpair(type=socket.SOCK_DGRAM))"),
    Attack(
        "sockets", "pair_with_a_name", "attempt(lambda: socket.socketpair()[0].bind('\\0sandbox-test-pair-@HOST@'))"
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
        "for ring in map(ctypes.c_long, (-1, -2, -3, -4, -5)):\n"
        "    attempt(lambda: syscall(248, 217, b'user', b'planted-@HOST@', b'x', ctypes.c_long(1), ring))",
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
        f"for folder in {FILES}: attempt(lambda: os.open(folder + '/sandbox-test-@HOST@', os.O_CREAT | os.O_WRONLY))",
        f"for folder in {FILES}: attempt(lambda: os.stat(folder + '/sandbox-test-@HOST@'))",
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
    Attack("forged", "patched_end", "sys.excepthook = lambda *_: None\nraise SystemError('hidden')", ended="fails"),
)
