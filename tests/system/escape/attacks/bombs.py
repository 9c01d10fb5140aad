"""Exhaustion of shared resources: each attack takes as much as it can, and returns how much."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import resource
import signal
import socket
import struct
import time
from collections.abc import Callable

CHUNK = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


def processes(limit: int, seconds: float) -> int:
    """A fork bomb of up to `limit` that stay for a while."""
    children = []
    try:
        for _ in range(limit):
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            children.append(child)
    except OSError as error:
        if error.errno != errno.EAGAIN:
            raise
    time.sleep(seconds)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return len(children)


def memory(kind: str, megabytes: int) -> int:
    """Takes memory of one kind until there is no more, or `megabytes` have been had; a killed process says nothing."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    take, taken = _KINDS[kind](), 0
    while taken < megabytes << 20:
        try:
            taken += take()
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            _go_on_in_a_child(hard)
            take = _KINDS[kind]()
    return taken >> 20


def _go_on_in_a_child(last: int) -> None:
    """Returns in a child that has few descriptors of the bomb's; the parent holds its own until the child has ended."""
    child = os.fork()
    if child == 0:
        os.closerange(64, last)  # below are the answer's
        return
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)


def _anonymous() -> Callable[[], int]:
    held = []

    def take() -> int:
        area = mmap.mmap(-1, CHUNK)
        area.write(b"x" * CHUNK)
        held.append(area)
        return CHUNK

    return take


def _file(fd: int) -> Callable[[], int]:
    return lambda: os.write(fd, b"x" * CHUNK)


def _shm() -> Callable[[], int]:
    """System V shared memory (shmget(2)), which outlives its creator."""
    _libc.shmat.restype = ctypes.c_void_p

    def take() -> int:
        segment = _libc.shmget(0, CHUNK, 0o1600)
        if segment < 0:
            raise OSError(ctypes.get_errno(), "shmget")
        ctypes.memset(_libc.shmat(segment, None, 0), 1, CHUNK)
        return CHUNK

    return take


def _sockets() -> Callable[[], int]:
    """Unread data in sockets, which is memory of the kernel."""
    held: list[socket.socket] = []

    def take() -> int:
        pair = socket.socketpair()
        held.extend(pair)
        pair[0].setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += pair[0].send(b"x" * 65536)
        return sent

    return take


def _pipes() -> Callable[[], int]:
    held: list[int] = []

    def take() -> int:
        reader, writer = os.pipe()
        held.extend((reader, writer))
        os.set_blocking(writer, False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += os.write(writer, b"x" * 65536)
        return sent

    return take


def _inodes() -> Callable[[], int]:
    """Empty files of a tmpfs: nothing but inodes and names, about a KiB each."""
    count = 0

    def take() -> int:
        nonlocal count
        for _ in range(1024):
            count += 1
            os.close(os.open(f"/t/{count:0200}", os.O_CREAT | os.O_WRONLY))
        return CHUNK

    return take


def _descriptors() -> Callable[[], int]:
    """Open files: a few hundred bytes of the kernel each, and a number of the host's (fs.file-max)."""

    def take() -> int:
        for _ in range(2048):
            os.eventfd(0)
        return CHUNK

    return take


_KINDS: dict[str, Callable[[], Callable[[], int]]] = {
    "anonymous": _anonymous,
    "tmpfs": lambda: _file(os.open("/t/bomb", os.O_CREAT | os.O_WRONLY)),
    "memfd": lambda: _file(os.memfd_create("bomb")),
    "System V": _shm,
    "sockets": _sockets,
    "pipes": _pipes,
    "inodes": _inodes,
    "descriptors": _descriptors,
}
KINDS = tuple(_KINDS)


def packet_ring(megabytes: int) -> int:
    """The ring of a packet socket (packet(7), PACKET_RX_RING), of that size; it is held for a moment."""
    with socket.socket(17, socket.SOCK_RAW, 0) as sock:
        blocks, frame = megabytes << 4, 1 << 11  # blocks of 64 KiB
        sock.setsockopt(263, 5, struct.pack("IIII", 1 << 16, blocks, frame, (blocks << 16) // frame))
        time.sleep(1)
    return megabytes


def files_of_a_tmpfs(directory: str, megabytes: int) -> str:
    """Writes until it is full: the errno."""
    fd = os.open(f"{directory}/bomb", os.O_CREAT | os.O_WRONLY)
    try:
        for _ in range(megabytes):
            os.write(fd, b"x" * CHUNK)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    finally:
        os.unlink(f"{directory}/bomb")
    return ""
