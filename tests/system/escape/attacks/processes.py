"""Attacks on other processes: listing, signals, tracing, entering their namespaces."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator

from tests.system.escape.attacks.calls import syscall

PTRACE_SEIZE, PTRACE_DETACH = 0x4206, 17
NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")


def seen() -> list[int]:
    """The processes that there are: of /proc, and those that only answer to signal 0 (a number is not hidden)."""
    listed = {int(name) for name in os.listdir("/proc") if name.isdigit()}
    for pid in range(1, 4096):
        with contextlib.suppress(ProcessLookupError):
            with contextlib.suppress(PermissionError):
                os.kill(pid, 0)
            listed.add(pid)
    return sorted(listed)


def ended_by_everybody() -> int:
    """kill(-1): every process but oneself and PID 1 that one may signal, in the PID namespace."""
    os.kill(-1, signal.SIGKILL)
    return 0


def number_of(pid: int) -> dict[str, str]:
    """The errno of each way to a process by a PID of the host."""
    ways: dict[str, Callable[[], object]] = {
        "kill": lambda: os.kill(pid, 0),
        "pidfd_open": lambda: syscall("pidfd_open", pid, 0),
        "ptrace": lambda: syscall("ptrace", PTRACE_SEIZE, pid, 0, 0),
        "process_vm_readv": lambda: memory_of(pid, 0x1000),
        "proc": lambda: os.listdir(f"/proc/{pid}/fd"),
        "setpgid": lambda: os.setpgid(pid, 0),
        "sched": lambda: os.sched_getaffinity(pid),
    }
    found = {}
    for name, way in ways.items():
        try:
            way()
            found[name] = ""
        except OSError as error:
            found[name] = errno.errorcode[error.errno or 0]
    return found


def memory_of(pid: int, address: int) -> bytes:
    """Eight bytes of another process by process_vm_readv(2)."""
    buffer = ctypes.create_string_buffer(8)
    local = struct.pack("QQ", ctypes.addressof(buffer), 8)
    syscall("process_vm_readv", pid, local, 1, struct.pack("QQ", address, 8), 1, 0)
    return buffer.raw


def namespaces_entered(pid: int) -> dict[str, str]:
    """The errno of setns(2) into each namespace of a process."""
    found = {}
    for kind in NAMESPACES:
        try:
            fd = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY)
            syscall("setns", fd, 0)
            found[kind] = ""
        except OSError as error:
            found[kind] = errno.errorcode[error.errno or 0]
    return found


def root_of(pid: int, path: str) -> str:
    """A file below the root of another process: /proc/PID/root is a door between mount namespaces."""
    with open(f"/proc/{pid}/root{path}") as file:
        return file.read(100)


def identity() -> dict[str, object]:
    """The identity of this process in the kernel."""
    with open("/proc/self/status") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    return {
        "uid": list(os.getresuid()),
        "gid": list(os.getresgid()),
        "namespaces": {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in NAMESPACES},
        **{name: status[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb", "NoNewPrivs", "Seccomp")},
    }


# -- what joins ---------------------------------------------------------------------------------------------


def spy(seconds: float, ready: str) -> dict[str, list[str]]:
    """Looks at each process that comes, in every way, as fast as it can: {way: what it got}.

    What it gets from the container's own processes shows that it would.
    """
    got: dict[str, set[str]] = {}
    end = time.monotonic() + seconds
    open(ready, "w").close()
    while time.monotonic() < end:
        for pid in _others():
            for way, what in _look(pid):
                got.setdefault(way, set()).add(what)
    return {way: sorted(found)[:50] for way, found in got.items()}


def ambush(seconds: float, ready: str) -> dict[str, list[str]]:
    """Stops each process in the first microseconds of its life, by guessing its number, and looks at it then.

    Who is root in a user namespace may stop whatever is in it (CAP_KILL); what is stopped doesn't go on to protect
    itself.
    """
    got: dict[str, set[str]] = {"stopped": set()}
    last = max(int(name) for name in os.listdir("/proc") if name.isdigit())
    open(ready, "w").close()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for pid in range(last + 1, last + 5):
            try:
                os.kill(pid, signal.SIGSTOP)
            except OSError:
                continue
            last = pid
            got["stopped"].add(str(pid))
            time.sleep(0.02)
            for way, what in _look(pid):
                got.setdefault(way, set()).add(what)
            with contextlib.suppress(OSError):
                got.setdefault("root", set()).add(" ".join(sorted(os.listdir(f"/proc/{pid}/root"))))
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)
                syscall("ptrace", PTRACE_DETACH, pid, 0, 0)
    return {way: sorted(found)[:50] for way, found in got.items()}


def trace_and_keep(seconds: float, ready: str) -> list[int]:
    """Seizes each process that comes (ptrace(2)), and lets none go: what ends meanwhile, its parent can't wait for.

    It ends early once there is a file whose name is that of `ready` and ``.stop``.
    """
    seized = []
    open(ready, "w").close()
    end = time.monotonic() + seconds
    while time.monotonic() < end and not os.path.exists(f"{ready}.stop"):
        for pid in _others():
            if pid != 1 and pid not in seized:
                with contextlib.suppress(OSError):
                    syscall("ptrace", PTRACE_SEIZE, pid, 0, 0)
                    seized.append(pid)
    return seized


def _others() -> list[int]:
    mine = os.getpid(), os.getppid()
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) not in mine]


def _look(pid: int) -> Iterator[tuple[str, str]]:
    for link in ("exe", "cwd", "root"):
        with contextlib.suppress(OSError):
            yield link, os.readlink(f"/proc/{pid}/{link}")
    with contextlib.suppress(OSError):
        yield "program's file system", str(os.stat(f"/proc/{pid}/exe").st_dev)
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                yield "fd", os.readlink(f"/proc/{pid}/fd/{number}")
    for file_name in ("environ", "maps"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/{file_name}", "rb") as file:
            for word in file.read().replace(b"\0", b"\n").split(b"\n"):
                yield file_name, word[-60:].decode(errors="replace")
    with contextlib.suppress(OSError):
        os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR))
        yield "mem", os.readlink(f"/proc/{pid}/exe")
    with contextlib.suppress(OSError):
        syscall("ptrace", PTRACE_SEIZE, pid, 0, 0)
        yield "ptrace", os.readlink(f"/proc/{pid}/exe")
    with contextlib.suppress(OSError):
        pidfd = syscall("pidfd_open", pid, 0)
        try:
            for descriptor in range(3, 16):
                with contextlib.suppress(OSError):
                    stolen = syscall("pidfd_getfd", pidfd, descriptor, 0)
                    yield "pidfd_getfd", os.readlink(f"/proc/self/fd/{stolen}")
                    os.close(stolen)
        finally:
            os.close(pidfd)
