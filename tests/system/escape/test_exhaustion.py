"""Resources that the kernel limits per user or for the whole host: a tenant can use up only its own part.

The counters of user_namespaces(7) also count for the owner of the namespace. When a runtime makes all namespaces as
root, inotify instances (inotify(7)), queued signals (sigqueue(3)) and message queues (mq_overview(7)) of all containers
are root's, and one hostile container takes inotify from every other and timers from the host. Terminals (pty(7)) are
counted for the host.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from insula.control.instances.drivers.container.spec import TERMINALS
from insula.kernel import syscalls
from tests.support.cli import Cli
from tests.system.conftest import TenantFactory
from tests.system.test_security import pid_of

_libc = ctypes.CDLL(None, use_errno=True)
_REALTIME = 40
_held: list[object] = []
_sets: list[int] = []


def inotify() -> int:
    return 0 if int(_libc.inotify_init1(os.O_CLOEXEC)) >= 0 else ctypes.get_errno()


def queue_signal() -> int:
    return 0 if _libc.sigqueue(os.getpid(), _REALTIME, None) == 0 else ctypes.get_errno()


def message_queue() -> int:
    """A queue that takes a large part of RLIMIT_MSGQUEUE, and has no name any more."""
    name = b"/insula-test-%d" % os.getpid()
    made = int(_libc.mq_open(name, os.O_RDWR | os.O_CREAT, 0o600, None))
    if made < 0:
        return ctypes.get_errno()
    _libc.mq_unlink(name)
    return 0


def terminal() -> int:
    try:
        os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
    except OSError as error:
        return error.errno or -1
    return 0


def pipe_pages() -> int:
    """A pipe with a buffer of a MiB; past fs.pipe-user-pages-soft an ordinary user gets none."""
    reader, _ = os.pipe()
    try:
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 1 << 20)
    except OSError as error:
        return error.errno or -1
    return 0


def descriptors_in_flight() -> int:
    """Two hundred descriptors in a message that is not received (unix(7)); the limit is RLIMIT_NOFILE for each user."""
    left, _ = pair = socket.socketpair()
    _held.append(pair)
    try:
        socket.send_fds(left, [b"x"], [left.fileno()] * 200)
    except OSError as error:
        return error.errno or -1
    return 0


def semaphores() -> int:
    """A set of semaphores (semget(2)), of which an IPC namespace has 32000."""
    made = int(_libc.semget(0, 1, 0o600))
    _sets.append(made)
    return 0 if made >= 0 else ctypes.get_errno()


def enter(pid: int) -> None:
    """Becomes root of the container whose PID 1 is `pid`, as far as the kernel's counters go."""
    pidfd = os.pidfd_open(pid)
    syscalls.setns(pidfd, syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS | syscalls.CLONE_NEWIPC)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


@contextmanager
def hog(pid: int, take: Callable[[], int]) -> Iterator[tuple[int, int]]:
    """A process in a container that has taken all it can get: how many, and the errno that ended it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            signal.pthread_sigmask(signal.SIG_BLOCK, {_REALTIME})
            enter(pid)
            count = 0
            while not (error := take()):
                count += 1
            os.write(write, f"{count} {error}".encode())
            signal.pause()
        finally:
            os._exit(1)
    try:
        os.close(write)
        taken, refusal = os.read(read, 100).split()
        yield int(taken), int(refusal)
    finally:
        os.close(read)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


CASES: list[tuple[Callable[[], int], set[int]]] = [
    (inotify, {errno.EMFILE}),
    (queue_signal, {errno.EAGAIN}),
    (message_queue, {errno.EMFILE}),
    (terminal, {errno.ENOSPC}),
    (pipe_pages, {errno.EPERM}),
    (descriptors_in_flight, {errno.ETOOMANYREFS}),
    (semaphores, {errno.ENOSPC}),
]


@pytest.fixture(scope="module")
def neighbours(tenants: TenantFactory) -> tuple[Cli, Cli]:
    made = tenants(), tenants()
    for cli in made:
        cli.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    return made


@pytest.mark.parametrize(("take", "refusals"), CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_one_tenants_exhaustion_does_not_affect_others(
    neighbours: tuple[Cli, Cli], take: Callable[[], int], refusals: set[int]
) -> None:
    hostile, neighbour = (pid_of(cli, "web") for cli in neighbours)
    with hog(hostile, take) as (taken, refusal):
        assert taken > 0 and refusal in refusals, "the control: it took all that it may have"
        assert take is not terminal or taken <= TERMINALS
        with hog(neighbour, take) as (others, _):
            assert others >= taken * 0.9, "the neighbour gets as much"
        host = os.fork()
        if host == 0:
            signal.pthread_sigmask(signal.SIG_BLOCK, {_REALTIME})
            refusal = take()
            for made in _sets:
                _libc.semctl(made, 0, 0)  # IPC_RMID: it would outlive the test
            os._exit(refusal)
        assert os.waitpid(host, 0)[1] == 0, "and so does the host's root"
