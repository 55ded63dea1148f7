"""Locks a process in and then runs Python in it: started as a script by `sandbox.py`, never imported by it.

    python -P -s -S confine.py SPEC START CODE

SPEC is a dictionary, marshalled, in hexadecimal digits: the interpreter `python` with its `options` and `environment`;
the folder `root` to build the program's file system at ("" without namespaces) from the host's `visible` paths; the
user `uid` that it becomes (None where there is no root to leave); the process `host` whose death it does not survive;
`cpu_s`, `memory_bytes`; `filter`, see `seccomp.build_filter`; the number of the system call `keyctl`; `ready_fd`. START
is the text of `start.py`.

One byte and no more on `ready_fd` says that every lock is on and the program runs; more is why it does not; without it,
what the process printed is this script's own error. Only the standard library, as the script runs before and outside
the package, and of it only what is quick to import (json, signal and typing would take a third of a call).
Numbers are those of Linux: <linux/prctl.h>, <linux/sched.h>, <linux/mount.h>, <sys/mount.h>.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import select
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SIGKILL = 9
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, _PR_SET_NO_NEW_PRIVS = 1, 22, 2, 38
_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_CLONE_NEWUSER = 0x10000000
_NEW_MOUNT, _NEW_UTS, _NEW_IPC, _NEW_PROCESS, _NEW_NETWORK = 0x20000, 1 << 26, 1 << 27, 1 << 29, 1 << 30
_NAMESPACES = _NEW_MOUNT | _NEW_UTS | _NEW_IPC | _NEW_PROCESS | _NEW_NETWORK
_MS_NOSUID, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4096, 16384, 1 << 18
_SYS_MOUNT_SETATTR = 442  # one number on every architecture; Linux 5.12
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_READ_ONLY, _NOSUID = 1, 2
_ADDR_NO_RANDOMIZE = 0x0040000
_KEYCTL_JOIN_SESSION_KEYRING = 1
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


def _libc(name: str, *arguments: Any) -> int:
    value = int(ctypes.CDLL(None, use_errno=True)[name](*arguments))
    if value < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return value


def _longs(first: int) -> list[ctypes.c_ulong]:
    return [ctypes.c_ulong(value) for value in (first, 0, 0, 0)]


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, data)]
    _libc("mount", *texts[:3], ctypes.c_ulong(flags), texts[3])


def _die_with_parent() -> None:
    # Lost when the process changes its user, kept by exec; the program may not call prctl (see `seccomp.py`).
    _libc("prctl", _PR_SET_PDEATHSIG, *_longs(_SIGKILL))


def _enter_namespaces(user: bool) -> None:
    """New namespaces; that of processes begins with the next child. `user`: where this process is not root."""
    uid, gid = os.geteuid(), os.getegid()
    _libc("unshare", _NAMESPACES | (_CLONE_NEWUSER if user else 0))
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE, None)


def _build_root(root: str, visible: list[str]) -> None:
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
    place = (ctypes.c_long(_SYS_MOUNT_SETATTR), ctypes.c_int(_AT_FDCWD), root.encode(), ctypes.c_uint(_AT_RECURSIVE))
    _libc("syscall", *place, attributes, ctypes.c_size_t(ctypes.sizeof(attributes)))


def _drop_privileges(uid: int | None) -> None:
    prctl, capability = ctypes.CDLL(None).prctl, 0
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


def _limit(spec: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_AS: spec["memory_bytes"],
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,  # no process and no thread: after the last fork, before exec
        resource.RLIMIT_NOFILE: 32,  # also bounds the memory of pipes and socket pairs, to some 7 MiB
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    # The soft limit's SIGXCPU tells the host why the program ended; SIGKILL follows if it is ignored.
    resource.setrlimit(resource.RLIMIT_CPU, (spec["cpu_s"], spec["cpu_s"] + 1))


def _filter(instructions: tuple[tuple[int, ...], ...]) -> None:
    """Installs `seccomp.build_filter`'s program; its negative values are this process's id."""

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("start", ctypes.c_char_p)]

    own = os.getpid()
    packed = [struct.pack("HBBI", *jumps, own if value < 0 else value) for *jumps, value in instructions]
    program = Program(len(packed), b"".join(packed))
    _libc("prctl", _PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(program))


def _become(spec: dict[str, Any], start: str, code: str) -> None:
    """Locks everything and turns into the Python that runs the code."""
    if spec["root"]:
        os.chroot(spec["root"])
        os.chdir("/tmp")
    # Without ASLR, what depends on addresses repeats: repr(object()), the order of sets of objects. Where a
    # container forbids it, it does not.
    ctypes.CDLL(None).personality(ctypes.c_ulong(_ADDR_NO_RANDOMIZE))
    _drop_privileges(spec["uid"])
    _die_with_parent()
    if not spec["root"] and os.getppid() != spec["host"]:
        os._exit(125)  # the host died before
    _limit(spec)
    os.set_inheritable(spec["ready_fd"], False)
    _filter(spec["filter"])
    os.write(spec["ready_fd"], b"1")
    try:
        os.execve(spec["python"], [spec["python"], *spec["options"], "-c", start, code], spec["environment"])
    except OSError as error:
        os.write(spec["ready_fd"], f"{error} (as user {os.geteuid()})".encode())
        os._exit(125)


def _wait(child: int) -> None:
    """Ends as the child ends, by 128 + the number of the signal that ended it."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(status if status >= 0 else 128 - status)


def main(spec: dict[str, Any], start: str, code: str) -> None:
    """Never returns: ends as the program ends, at once where the host is killed."""
    # A new, empty session keyring. It may be refused (a quota, a container's own filter): whatever keyring the
    # program has, the filter keeps it from using it.
    ctypes.CDLL(None).syscall(ctypes.c_long(spec["keyctl"]), _KEYCTL_JOIN_SESSION_KEYRING, None)
    if not spec["root"]:
        _become(spec, start, code)
    _enter_namespaces(user=spec["uid"] is None)
    _die_with_parent()
    if os.getppid() != spec["host"]:
        os._exit(125)
    parent_lives, held = os.pipe()
    if (first := os.fork()) != 0:
        _wait(first)
    # The first process of a process namespace: when it ends, the kernel ends all others in it.
    os.close(held)
    _die_with_parent()
    if select.select([parent_lives], [], [], 0)[0]:  # its end: the parent died before
        os._exit(125)
    _build_root(spec["root"], spec["visible"])
    if (program := os.fork()) != 0:
        _wait(program)
    _become(spec, start, code)


if __name__ == "__main__":
    main(marshal.loads(bytes.fromhex(sys.argv[1])), sys.argv[2], sys.argv[3])
