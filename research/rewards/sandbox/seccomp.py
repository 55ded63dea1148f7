"""The system calls that a sandboxed program may not make, as a seccomp filter (classic BPF).

The kernel runs the filter on every call of the process; it cannot be taken off. Calls are written
name/number on x86_64/number on aarch64, numbers as in <asm/unistd.h>, "-" where a call does not exist.
"""

import errno
from collections.abc import Sequence
from typing import NamedTuple

OWN_PID = -1
"""Stands for the id of the process that installs the filter, known only there."""
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH_* of <linux/audit.h>, by `os.uname().machine`."""
KEYCTL = "keyctl/250/219"

_REFUSED = (
    # No second process or thread: everything a program starts ends with it.
    (errno.EAGAIN, "fork/57/- vfork/58/- clone/56/220 clone3/435/435"),
    # Keyrings outlive the program, and hold the host's keys.
    (errno.EPERM, f"add_key/248/217 request_key/249/218 {KEYCTL}"),
    # io_uring makes calls that no filter sees.
    (errno.EPERM, "io_uring_setup/425/425 io_uring_enter/426/426 io_uring_register/427/427"),
    # Sockets of every family; `socketpair` makes unnamed ones (below), whose buffers keep their small size.
    (errno.EPERM, "socket/41/198 bind/49/200 connect/42/203 listen/50/201 accept/43/202 accept4/288/242"),
    (errno.EPERM, "sendmsg/46/211 sendmmsg/307/269 setsockopt/54/208"),
    # Memory outside the address space, some of which outlives the program: System V, message queues, memfd.
    (errno.EPERM, "shmget/29/194 shmat/30/196 shmctl/31/195 semget/64/190 semop/65/193 semtimedop/220/192"),
    (errno.EPERM, "semctl/66/191 msgget/68/186 msgsnd/69/189 msgrcv/70/188 msgctl/71/187 mq_open/240/180"),
    (errno.EPERM, "mq_unlink/241/181 memfd_create/319/279 memfd_secret/447/447"),
    (errno.EPERM, "inotify_init/253/- inotify_init1/294/26 fanotify_init/300/262"),
    # Other processes; `prctl` could undo that the program dies with its parent.
    (errno.EPERM, "ptrace/101/117 process_vm_readv/310/270 process_vm_writev/311/271 kcmp/312/272"),
    (errno.EPERM, "pidfd_open/434/434 pidfd_getfd/438/438 pidfd_send_signal/424/424 process_madvise/440/440"),
    (errno.EPERM, "process_mrelease/448/448 migrate_pages/256/238 move_pages/279/239 prctl/157/167"),
    (errno.EPERM, "rt_sigqueueinfo/129/138 rt_tgsigqueueinfo/297/240 setpriority/141/140 ioprio_set/251/30"),
    (errno.EPERM, "sched_setaffinity/203/122 sched_setattr/314/274 sched_setparam/142/118"),
    (errno.EPERM, "sched_setscheduler/144/119 perf_event_open/298/241 bpf/321/280 userfaultfd/323/282"),
    (errno.EPERM, "syslog/103/116"),
    # Namespaces, mounts, and files by handle.
    (errno.EPERM, "unshare/272/97 setns/308/268 mount/165/40 umount2/166/39 pivot_root/155/41 chroot/161/51"),
    (errno.EPERM, "fsopen/430/430 fsconfig/431/431 fsmount/432/432 fspick/433/433 move_mount/429/429"),
    (errno.EPERM, "open_tree/428/428 mount_setattr/442/442 name_to_handle_at/303/264"),
    (errno.EPERM, "open_by_handle_at/304/265"),
    # Changes to the file system, for where it cannot be mounted read-only.
    (errno.EROFS, "creat/85/- mkdir/83/- mkdirat/258/34 mknod/133/- mknodat/259/33 rmdir/84/- unlink/87/-"),
    (errno.EROFS, "unlinkat/263/35 rename/82/- renameat/264/38 renameat2/316/276 link/86/- linkat/265/37"),
    (errno.EROFS, "symlink/88/- symlinkat/266/36 truncate/76/45 chmod/90/- fchmod/91/52 fchmodat/268/53"),
    (errno.EROFS, "fchmodat2/452/452 chown/92/- fchown/93/55 lchown/94/- fchownat/260/54 utime/132/-"),
    (errno.EROFS, "utimes/235/- futimesat/261/- utimensat/280/88 setxattr/188/5 lsetxattr/189/6"),
    (errno.EROFS, "fsetxattr/190/7 removexattr/197/14 lremovexattr/198/15 fremovexattr/199/16"),
    (errno.ENOSYS, "openat2/437/437"),  # its flags lie in memory, where a filter cannot look
)
_FIRST_UNKNOWN = 463  # calls of Linux 6.11 and later, which nobody has judged; also x32's


class _Rule(NamedTuple):
    """`call` passes only where `argument & mask` is one of `values`."""

    call: str
    argument: int
    mask: int
    values: Sequence[int]
    error: int = errno.EPERM


_ALL = 0xFFFFFFFF
_RULES = (
    *(_Rule(call, 0, _ALL, (OWN_PID,)) for call in ("kill/62/129", "tkill/200/130", "tgkill/234/131")),
    _Rule("prlimit64/302/261", 0, _ALL, (0,)),
    _Rule("socketpair/53/199", 0, _ALL, (1,)),  # AF_UNIX
    _Rule("socketpair/53/199", 1, 0xF, (1,)),  # SOCK_STREAM: a datagram socket could send to any address
    # F_DUPFD to F_SETLKW, and F_DUPFD_CLOEXEC: not the owner that gets signals, nor a pipe's size.
    _Rule("fcntl/72/25", 1, _ALL, (*range(8), 1030)),
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
    _Rule("ioctl/16/29", 1, _ALL, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
)
_WRITING = 0o1103  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
_READ_ONLY = (_Rule("open/2/-", 1, _WRITING, (0,), errno.EROFS), _Rule("openat/257/56", 2, _WRITING, (0,), errno.EROFS))


Instruction = tuple[int, int, int, int]
"""`struct sock_filter` of <linux/filter.h>: code, jumps if true and if false (in instructions), value or `OWN_PID`."""


def _load(offset: int) -> Instruction:  # of struct seccomp_data: number, architecture, address, arguments
    return (0x20, 0, 0, offset)


def _if_equal(value: int, then: int, otherwise: int) -> Instruction:
    return (0x15, then, otherwise, value)


def _fail(error: int) -> Instruction:
    return (0x06, 0, 0, 0x00050000 | error)


def call_number(call: str, machine: str) -> int | None:
    """The number of a call such as `KEYCTL`, None where the machine does not have it."""
    number = call.split("/")[1 + list(MACHINES).index(machine)]
    return None if number == "-" else int(number)


def build_filter(machine: str, *, read_only: bool) -> tuple[Instruction, ...]:
    """The filter for a machine of `MACHINES`; `read_only` also refuses to open a file for writing."""
    rules = (*_RULES, *_READ_ONLY) if read_only else _RULES
    return (
        _load(4),
        _if_equal(MACHINES[machine], 1, 0),
        (0x06, 0, 0, 0x80000000),  # another architecture's call: kill
        _load(0),
        (0x35, 0, 1, _FIRST_UNKNOWN),  # number >= value
        _fail(errno.ENOSYS),
        *(
            instruction
            for error, calls in _REFUSED
            for call in calls.split()
            if (number := call_number(call, machine)) is not None
            for instruction in (_if_equal(number, 0, 1), _fail(error))
        ),
        *(
            instruction
            for rule in rules
            if (number := call_number(rule.call, machine)) is not None
            for instruction in _checked(rule, number)
        ),
        (0x06, 0, 0, 0x7FFF0000),  # allow
    )


def _checked(rule: _Rule, number: int) -> tuple[Instruction, ...]:
    count = len(rule.values)
    return (
        _load(0),
        _if_equal(number, 0, count + 3),
        _load(16 + 8 * rule.argument),  # the lower half: all these arguments are 32-bit
        (0x54, 0, 0, rule.mask),
        *(_if_equal(value, count - index, 0) for index, value in enumerate(rule.values)),
        _fail(rule.error),
    )
