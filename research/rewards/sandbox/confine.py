"""Locks a process in and then runs Python in it: started as a script by `python.py`, never imported by it.

    python -P -s -S confine.py SPEC CODE

SPEC is the JSON of `python.Confinement`. One byte and no more on `ready_fd` says that every lock is on and the
program runs; more is why it does not; without it, what the process printed is this script's own error. Only the
standard library: the script runs before and outside the package. Linux numbers are those of <linux/prctl.h>,
<linux/mount.h> and <sys/mount.h>.
"""

import ctypes
import json
import math
import os
import resource
import signal
import sys
from typing import Any

_PR_CAPBSET_READ, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 23, 24, 38
_MS_NOSUID, _MS_BIND, _MS_REC = 2, 4096, 16384
_SYS_MOUNT_SETATTR = 442  # one number on every architecture; Linux 5.12
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_READ_ONLY, _NOSUID = 1, 2
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


def _libc(name: str, *arguments: Any) -> int:
    value = int(ctypes.CDLL(None, use_errno=True)[name](*arguments))
    if value < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return value


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, data)]
    _libc("mount", *texts[:3], ctypes.c_ulong(flags), texts[3])


def build_root(root: str, visible: list[str]) -> None:
    """A read-only file system at `root`: the `visible` paths, three devices, an empty /tmp, and nothing else.

    Needs a mount namespace of its own, so that nobody else sees it.
    """
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID, "size=1m,mode=755")
    for path in (*visible, *_DEVICES):
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):  # /lib -> usr/lib
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.close(os.open(target, os.O_CREAT, 0o644))
        _mount(path, target, None, _MS_BIND | _MS_REC, None)
    os.mkdir(f"{root}/tmp")
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY | _NOSUID, 0, 0, 0)
    _libc(
        "syscall",
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        ctypes.c_int(_AT_FDCWD),
        root.encode(),
        ctypes.c_uint(_AT_RECURSIVE),
        attributes,
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )


def _drop_privileges(uid: int | None) -> None:
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None).prctl
        capability = 0
        # After exec even a user namespace's root has no capability.
        while os.geteuid() == 0 and prctl(_PR_CAPBSET_READ, *_longs(capability)) >= 0:
            # Without CAP_SETPCAP (a container's root) this fails; what is left is lost with the uid below.
            prctl(_PR_CAPBSET_DROP, *_longs(capability))
            capability += 1
        _libc("prctl", _PR_SET_NO_NEW_PRIVS, *_longs(1))
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def _longs(first: int) -> list[ctypes.c_ulong]:
    return [ctypes.c_ulong(value) for value in (first, 0, 0, 0)]


def _limit(spec: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_AS: spec["memory_bytes"],
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,  # no process and no thread: after the last fork, before exec
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    # The soft limit's SIGXCPU tells the host why the program ended; SIGKILL follows if it is ignored.
    resource.setrlimit(resource.RLIMIT_CPU, (spec["cpu_s"], spec["cpu_s"] + 1))


def _become(spec: dict[str, Any], code: str) -> None:
    """Locks everything and turns into the Python that runs the code."""
    if spec["root"]:
        os.chroot(spec["root"])
        os.chdir("/tmp")
    _drop_privileges(spec["uid"])
    _limit(spec)
    os.set_inheritable(spec["ready_fd"], False)
    os.write(spec["ready_fd"], b"1")
    python = spec["python"]
    try:
        os.execve(python, [python, *spec["options"], "-c", code], spec["environment"])
    except OSError as error:
        os.write(spec["ready_fd"], f"{error} (as user {os.geteuid()})".encode())
        os._exit(125)


def main(spec: dict[str, Any], code: str) -> None:
    """Never returns: ends as the program ends, by 128 + the number of the signal that ended it."""
    wall = math.ceil(spec["wall_s"]) + 1  # should the host die, nothing stays behind
    if not spec["root"]:
        signal.alarm(wall)
        _become(spec, code)
    # The first process of a process namespace: when it ends, the kernel ends all others in it.
    build_root(spec["root"], spec["visible"])
    child = os.fork()
    if child == 0:
        _become(spec, code)
    os.close(spec["ready_fd"])
    signal.signal(signal.SIGALRM, lambda *_: os._exit(124))
    signal.alarm(wall)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
