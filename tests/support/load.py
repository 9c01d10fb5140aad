"""Traffic that fills a link, sent by processes of its own, and what of it arrives."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator

from insula.kernel import syscalls
from tests.support.wait import until

CHUNK = 1 << 16
_MOST_DESCRIPTORS = 1 << 20


def _spawn(netns: int, run: Callable[[], None], keep: int = 2) -> int:
    """Run in a process that ends with this one. Of its descriptors only `keep` stays open: others are a fabric's."""
    pid = os.fork()
    if pid == 0:
        try:
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
            syscalls.setns(netns, syscalls.CLONE_NEWNET)
            os.closerange(3, keep)
            os.closerange(keep + 1, _MOST_DESCRIPTORS)
            run()
        finally:
            os._exit(0)
    return pid


def _stop(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextlib.contextmanager
def sink(netns: int, port: int) -> Iterator[None]:
    """A TCP server on that port that discards all it gets. A client that sends "get" first gets data without end."""
    ready, told = os.pipe()

    def run() -> None:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            until(lambda: _binds(server, port), "no process of an earlier sink has the port any more")
            server.listen(128)
            os.write(told, b"x")
            os.close(told)
            while True:
                connection, _ = server.accept()
                if os.fork() == 0:
                    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
                    server.close()
                    with contextlib.suppress(OSError):
                        if connection.recv(3) == b"get":
                            while True:
                                connection.sendall(bytes(CHUNK))
                        while connection.recv(CHUNK):
                            pass
                    os._exit(0)
                connection.close()

    pid = _spawn(netns, run, told)
    os.close(told)  # so that the read below ends when the process does
    try:
        with os.fdopen(ready, "rb") as pipe:
            assert pipe.read() == b"x", "the sink could not start"
        yield
    finally:
        _stop([pid])


def _binds(server: socket.socket, port: int) -> bool:
    try:
        server.bind(("::", port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


@contextlib.contextmanager
def tcp(
    netns: int, address: str, port: int, *, connections: int = 1, get: bool = False, control: str | None = None
) -> Iterator[None]:
    """Connections that send to a sink as fast as they can, or with `get` receive. `control` is the algorithm of
    congestion control, as cubic (tcp(7)); None is that of the host."""

    def run() -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        while True:
            with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as sock:
                if control is not None:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, control.encode())
                sock.settimeout(10)
                sock.connect((address, port))
                sock.sendall(b"get" if get else b"put")
                while sock.recv(CHUNK) if get else not sock.sendall(bytes(CHUNK)):  # type: ignore[func-returns-value]
                    pass
            time.sleep(0.05)

    pids = [_spawn(netns, run) for _ in range(connections)]
    try:
        yield
    finally:
        _stop(pids)


@contextlib.contextmanager
def udp(netns: int, address: str, port: int, *, size: int = 1400, rate: int | None = None) -> Iterator[None]:
    """Datagrams of `size` bytes, as many as this machine can send, or `rate` bits a second."""

    def run() -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            data, began, sent = bytes(size), time.monotonic(), 0
            while True:
                with contextlib.suppress(OSError):
                    sock.sendto(data, (address, port))
                sent += size * 8
                if rate is not None:
                    time.sleep(max(0.0, began + sent / rate - time.monotonic()))

    pids = [_spawn(netns, run)]
    try:
        yield
    finally:
        _stop(pids)


def rates(count: Callable[[], dict[str, int]], seconds: float, settle: float = 1.0) -> dict[str, float]:
    """Return bits a second by name, measured over some seconds; `count` returns bytes by name."""
    time.sleep(settle)
    began, before = time.monotonic(), count()
    time.sleep(seconds)
    after, took = count(), time.monotonic() - began
    return {name: (after[name] - before[name]) * 8 / took for name in after}
