"""Processes in control groups, and the operations that are allowed there."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from insula.kernel import cgroups, syscalls
from insula.kernel.cgroups import Cgroup, Hierarchy
from tests.forked import forked

T = TypeVar("T")
_numbers = itertools.count()


def trees() -> dict[str, Hierarchy]:
    """The host's hierarchy, and on a hybrid host the version 2 tree beside it, which has devices and the freezer."""
    found = {f"v{cgroups.hierarchy().version}": cgroups.hierarchy()}
    if not cgroups.hierarchy().unified:
        with open("/proc/self/mounts") as mounts:
            beside = [line.split()[1] for line in mounts if line.split()[2] == "cgroup2"]
        if beside:
            found["v2 beside v1"] = Hierarchy(beside[0], {})
    return found


@contextmanager
def made(prefix: str, tree: Hierarchy | None = None) -> Iterator[Cgroup]:
    """A new group below one that is removed with it."""
    top = Cgroup(f"{prefix}-cg{next(_numbers)}", tree)
    group = Cgroup(f"{top.path}/inner", tree)
    group.create()
    try:
        yield group
    finally:
        top.kill()
        top.remove()


def inside(group: Cgroup, function: Callable[[], T]) -> T:
    """Run `function` in a process of the group and return its result; exceptions are raised here (see `forked`)."""
    files = group.open()

    def child() -> T:
        cgroups.join(files)
        return function()

    try:
        return forked(child)
    finally:
        for fd in files:
            os.close(fd)


class Running:
    """A process in a group; `end` waits for its end and gives its exit status, negative for a signal."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._ended: int | None = None

    def end(self) -> int:
        if self._ended is None:
            self._ended = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._ended

    def alive(self) -> bool:
        if self._ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._ended = os.waitstatus_to_exitcode(status)
        return self._ended is None


@contextmanager
def running(group: Cgroup, body: Callable[[], object]) -> Iterator[Running]:
    """A process that has joined the group and does `body` again and again. It dies with us, and at the end."""
    files = group.open()
    joined, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
            cgroups.join(files)
            os.write(tell, b"joined")
            while True:
                body()
        finally:
            os._exit(1)
    process = Running(pid)
    os.close(tell)
    for fd in files:
        os.close(fd)
    try:
        assert os.read(joined, 6), "it could not join"
        yield process
    finally:
        os.close(joined)
        if process.alive():
            os.kill(pid, signal.SIGKILL)
            group.thaw()
            process.end()


class Counter:
    """A number that processes share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)
        self._number = ctypes.c_uint64.from_buffer(self._memory)

    def __call__(self) -> None:
        """One more."""
        self._number.value += 1

    @property
    def value(self) -> int:
        return self._number.value


def spin() -> None:
    """Work for a moment."""
    for _ in range(10_000):
        pass


def touch(size: int) -> mmap.mmap:
    """So many bytes of memory, all in use."""
    memory = mmap.mmap(-1, size)
    for offset in range(0, size, 4096):
        memory[offset] = 1
    return memory
