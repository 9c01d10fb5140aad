"""What a lab's tenants offer to the outside, as intents, and servers that tell who called them."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Sequence

from insula.kernel.netns import call_in
from insula.model.objects import PublishedPort
from insula.model.publishing import parse
from insula.network.intent import Forward, OutsideIntent
from insula.network.linux.state import addresses
from tests.support.lab import SOON, Instance, Lab

SO_RCVBUFFORCE = 33  # asm-generic/socket.h


def publish(lab: Lab, tenant: str, **published: str | Sequence[str]) -> None:
    """Publish these ports, by instance, as they are written on the command line, and no others."""
    forwards = [
        forward(lab, tenant, name, PublishedPort(**parse(text)))
        for name, some in published.items()
        for text in ([some] if isinstance(some, str) else some)
    ]
    lab.apply(tenant, outside=OutsideIntent(forwards=forwards))


def forward(lab: Lab, tenant: str, name: str, published: PublishedPort) -> Forward:
    return Forward(published=published, addresses=addresses(lab.instances[tenant, name].port))


def tells(instance: Instance, port: int, *, udp: bool = False, name: str = "") -> None:
    """A server in the instance that answers with `name` and the client's address, in a process of its own."""
    kind = socket.SOCK_DGRAM if udp else socket.SOCK_STREAM
    with instance.socket(socket.AF_INET6, kind) as server:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)  # thousands of datagrams at once
        server.bind(("::", port))
        if not udp:
            server.listen(64)
        if os.fork() == 0:
            while True:
                if udp:
                    _, caller = server.recvfrom(2048)
                    server.sendto(_told(name, caller[0]), caller)
                else:
                    connection, caller = server.accept()
                    connection.send(_told(name, caller[0]))
                    connection.close()


def echoes(instance: Instance, port: int) -> None:
    """A TCP server that sends back what it gets, on each connection for as long as it lasts."""
    with instance.socket(socket.AF_INET6, socket.SOCK_STREAM) as server:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("::", port))
        server.listen(64)
        if os.fork() == 0:
            while True:
                connection, _ = server.accept()
                if os.fork() == 0:
                    while data := connection.recv(4096):
                        connection.sendall(data)
                    os._exit(0)
                connection.close()


def _told(name: str, caller: str) -> bytes:
    return f"{name} {caller.removeprefix('::ffff:')}".strip().encode()


def asks(netns: int, address: str, port: int, timeout: float = SOON) -> str:
    """The answer to a datagram; "" if there is none in time. It is sent again, since a datagram may be lost."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with call_in(netns, lambda: socket.socket(family, socket.SOCK_DGRAM)) as sock:
        deadline = time.monotonic() + timeout
        sock.settimeout(min(0.2, timeout))
        while time.monotonic() < deadline:
            try:
                sock.sendto(b"who am I?", (address, port))
                return sock.recv(2048).decode()
            except OSError:
                continue
    return ""


def connection(netns: int | None, address: str, port: int, timeout: float = SOON) -> socket.socket:
    """An open connection from a namespace, or from the host's. OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made: socket.socket = (
        socket.socket(family, socket.SOCK_STREAM)
        if netns is None
        else call_in(netns, lambda: socket.socket(family, socket.SOCK_STREAM))
    )
    made.settimeout(timeout)
    try:
        made.connect((address, port))
    except BaseException:
        made.close()
        raise
    return made


def answers(netns: int | None, address: str, port: int, timeout: float = SOON) -> str:
    """What a TCP server there says first; "" if nobody answers in time."""
    try:
        with connection(netns, address, port, timeout) as sock:
            return sock.recv(200).decode()
    except OSError:
        return ""


def refuses(netns: int | None, address: str, port: int, timeout: float = SOON) -> bool:
    """Whether a connection is refused with a reset: not answered, and not dropped."""
    try:
        connection(netns, address, port, timeout).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        pass
    return False


def refuses_datagrams(netns: int, address: str, port: int, timeout: float = 10 * SOON) -> bool:
    """Whether ICMP says that the port is unreachable. It is asked again, as routers limit how often they say it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with call_in(netns, lambda: socket.socket(family, socket.SOCK_DGRAM)) as sock:
        sock.settimeout(0.2)
        sock.connect((address, port))
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                sock.send(b"is somebody there?")
                sock.recv(2048)
                return False
            except TimeoutError:
                continue
            except ConnectionRefusedError:
                return True
    return False


def alive(sock: socket.socket, timeout: float = SOON) -> bool:
    """Whether an `echoes` server still answers on this connection."""
    sock.settimeout(timeout)
    token = os.urandom(4).hex().encode()
    try:
        sock.sendall(token)
        got = b""
        while len(got) < len(token) and (more := sock.recv(4096)):
            got += more
    except OSError:
        return False
    return got == token


def resets(sock: socket.socket) -> None:
    """Close a connection with a reset, so that no entry of it waits (TIME_WAIT)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
