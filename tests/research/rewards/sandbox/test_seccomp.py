"""The filter's numbers are the kernel's, and its jumps lead where they should."""

import re
from pathlib import Path

import pytest

from research.rewards.sandbox import seccomp
from research.rewards.sandbox.seccomp import MACHINES, OWN_PID, build_filter, call_number

HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}
ALLOW, EPERM, EROFS, ENOSYS, EAGAIN, KILL = 0x7FFF0000, 0x50001, 0x5001E, 0x50026, 0x5000B, 0x80000000


def verdict(machine: str, number: int, arguments: tuple[int, ...] = (), *, read_only=False, architecture=None) -> int:
    """What the kernel would do: an interpreter of the few instructions that the filter uses."""
    data = {0: number, 4: architecture or MACHINES[machine]}
    data |= {16 + 8 * index: value for index, value in enumerate((*arguments, *[0] * 6)[:6])}
    program, at, register = build_filter(machine, read_only=read_only), 0, 0
    while True:
        code, yes, no, value = program[at]
        if code == 0x06:
            return value
        if code == 0x20:
            register = data[value]
        elif code == 0x54:
            register &= value
        else:
            assert 0 <= yes < 256 and 0 <= no < 256
            at += yes if {0x15: register == value & 0xFFFFFFFF, 0x35: register >= value}[code] else no
        at += 1


@pytest.mark.parametrize("machine", MACHINES)
def test_numbers_are_those_of_the_headers(machine):
    path = Path(HEADERS[machine])
    if not path.exists():
        pytest.skip(f"{path} is not installed")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text())
    numbers = {name: int(number) for name, number in found}
    calls = [call for _, group in seccomp._REFUSED for call in group.split()]
    calls += [rule.call for rule in (*seccomp._RULES, *seccomp._READ_ONLY)]
    for call in calls:
        name, expected = call.split("/")[0], call_number(call, machine)
        if expected is None or name in numbers:  # the headers may be older than a call
            assert expected == numbers.get(name), call
    assert sum(call.split("/")[0] in numbers for call in calls) > 90


@pytest.mark.parametrize(
    ("machine", "number", "arguments", "expected"),
    [
        ("x86_64", 0, (), ALLOW),  # read
        ("x86_64", 59, (), ALLOW),  # execve
        ("x86_64", 57, (), EAGAIN),  # fork
        ("aarch64", 57, (), ALLOW),  # close: fork's number elsewhere
        ("x86_64", 250, (), EPERM),  # keyctl
        ("aarch64", 219, (), EPERM),
        ("x86_64", 41, (40, 1), EPERM),  # socket
        ("x86_64", 53, (1, 1), ALLOW),  # socketpair: AF_UNIX, SOCK_STREAM
        ("x86_64", 53, (1, 1 | 0o2000000), ALLOW),  # SOCK_CLOEXEC
        ("x86_64", 53, (1, 2), EPERM),  # SOCK_DGRAM
        ("x86_64", 53, (2, 1), EPERM),  # AF_INET
        ("x86_64", 62, (OWN_PID, 9), ALLOW),  # kill
        ("x86_64", 62, (1, 9), EPERM),
        ("x86_64", 302, (0,), ALLOW),  # prlimit64
        ("x86_64", 302, (7,), EPERM),
        ("x86_64", 72, (1, 4), ALLOW),  # fcntl: F_SETFL
        ("x86_64", 72, (1, 8), EPERM),  # F_SETOWN
        ("x86_64", 72, (1, 1031), EPERM),  # F_SETPIPE_SZ
        ("x86_64", 16, (0, 0x5401), ALLOW),  # ioctl: TCGETS
        ("x86_64", 16, (0, 0x5412), EPERM),  # TIOCSTI
        ("x86_64", 0x40000000, (), ENOSYS),  # x32
        ("aarch64", 500, (), ENOSYS),
    ],
)
def test_verdicts(machine, number, arguments, expected):
    assert verdict(machine, number, arguments) == expected


@pytest.mark.parametrize(("machine", "number"), [("x86_64", 257), ("aarch64", 56)])
def test_a_file_system_that_is_not_mounted_read_only(machine, number):
    reading, writing = (0, 0, 0o2000000), (0, 0, 0o1101)
    assert verdict(machine, number, reading, read_only=True) == ALLOW
    assert verdict(machine, number, writing, read_only=True) == EROFS
    assert verdict(machine, number, writing) == ALLOW


def test_another_architecture_is_killed():
    assert verdict("x86_64", 0, architecture=0x40000003) == KILL
