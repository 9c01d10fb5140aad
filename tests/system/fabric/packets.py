"""Which connections really work: every instance tries every address with TCP and UDP, all at once.

Each try has a token of its own, so that one that arrives at the wrong instance is told from one that arrives at the
right one. The sockets are made in the instances' namespaces, and one loop serves them all.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import selectors
import socket
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from tests.support.lab import Instance
from tests.support.wait import patiently

PORTS = {"tcp": (80, 443, 8080), "udp": (53, 80, 5000)}
"""The ports that are tried, by protocol."""
_KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
_TOKEN = 8
_ENOUGH = patiently(10.0)
"""Seconds within which arrives what may."""
_GRACE = 0.2
"""Seconds for what may not arrive, after all else has."""
_AGAIN = 0.5
"""Seconds until a datagram is sent again: one may find a full buffer."""


class Place(NamedTuple):
    """An instance, by the names of its tenant and its own."""

    tenant: str
    name: str


class Flow(NamedTuple):
    """One try: a source, an address that it has, the address that it tries, and where that leads."""

    source: Place
    from_address: str
    to_address: str
    protocol: str
    port: int


class Arrival(NamedTuple):
    """A flow, and the instance at which it arrived."""

    flow: Flow
    at: Place


def flows(owned: Mapping[Place, Sequence[str]], ports: Mapping[str, Sequence[int]] = PORTS) -> Iterator[Flow]:
    """Every try of an instance at an address that it does not have itself, of any tenant. `owned` are the addresses of
    each instance."""
    known = sorted({address for some in owned.values() for address in some})
    for place, own in owned.items():
        for source in own:
            for target in known:
                if target not in own and (":" in source) == (":" in target):
                    for protocol, numbers in ports.items():
                        yield from (Flow(place, source, target, protocol, port) for port in numbers)


def arrivals(
    instances: Mapping[Place, Instance],
    owned: Mapping[Place, Sequence[str]],
    tried: Iterable[Flow],
    expected: Collection[Arrival],
) -> set[Arrival]:
    """Try these flows and return where they arrived. Those that are expected are waited for, others for a moment.
    `owned` are the addresses of the instances."""
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        exchange = _Exchange(selector, stack)
        for place, instance in instances.items():
            instance.do(functools.partial(exchange.listen, place, owned[place]))
        by_source: dict[Place, list[Flow]] = {}
        for flow in tried:
            by_source.setdefault(flow.source, []).append(flow)
        for place, some in by_source.items():
            instances[place].do(functools.partial(exchange.send, some))
        exchange.run(set(expected))
        return exchange.arrived


class _Exchange:
    """The sockets of all instances, and what has arrived at them."""

    def __init__(self, selector: selectors.BaseSelector, stack: contextlib.ExitStack) -> None:
        self.arrived: set[Arrival] = set()
        self._selector = selector
        self._stack = stack
        self._tokens: dict[bytes, Flow] = {}
        self._datagrams: dict[Flow, tuple[socket.socket, bytes]] = {}

    def listen(self, place: Place, owned: Sequence[str]) -> None:
        """Serve all ports at these addresses. Runs in the instance's namespace."""
        for address in owned:
            for protocol, numbers in PORTS.items():
                for port in numbers:
                    sock = self._socket(address, protocol)
                    sock.bind((address, port))
                    if protocol == "tcp":
                        sock.listen(256)
                        self._selector.register(sock, selectors.EVENT_READ, (self._accept, place))
                    else:
                        self._selector.register(sock, selectors.EVENT_READ, (self._read, place))

    def send(self, some: Iterable[Flow]) -> None:
        """Begin to try flows of one instance. Runs in its namespace."""
        for flow in some:
            self._send(flow)

    def _send(self, flow: Flow) -> None:
        sock, token = self._socket(flow.from_address, flow.protocol), os.urandom(_TOKEN)
        self._tokens[token] = flow
        sock.bind((flow.from_address, 0))
        error = sock.connect_ex((flow.to_address, flow.port))
        if flow.protocol == "udp":
            self._datagrams[flow] = sock, token
            self._again([flow])
        elif error in (0, errno.EINPROGRESS):
            self._selector.register(sock, selectors.EVENT_WRITE, (self._connected, token))

    def run(self, expected: set[Arrival]) -> None:
        """Serve until everything that is expected has arrived, and for a moment more."""
        deadline, next_time = time.monotonic() + _ENOUGH, time.monotonic() + _AGAIN
        while (missing := expected - self.arrived) and (now := time.monotonic()) < deadline:
            self._serve(min(deadline, next_time) - now)
            if time.monotonic() >= next_time:
                self._again(each.flow for each in missing if each.flow in self._datagrams)
                next_time = time.monotonic() + _AGAIN
        end = time.monotonic() + _GRACE
        while (left := end - time.monotonic()) > 0:
            self._serve(left)

    def _again(self, some: Iterable[Flow]) -> None:
        for flow in some:
            sock, token = self._datagrams[flow]
            with contextlib.suppress(OSError):  # it was refused, as by ICMP
                sock.send(token)

    def _serve(self, timeout: float) -> None:
        for key, _ in self._selector.select(max(0.0, timeout)):
            function, about = key.data
            assert isinstance(key.fileobj, socket.socket)
            try:
                function(key.fileobj, about)
            except BlockingIOError:
                continue
            except OSError:
                self._selector.unregister(key.fileobj)

    def _socket(self, address: str, protocol: str) -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = self._stack.enter_context(socket.socket(family, _KINDS[protocol]))
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return sock

    def _connected(self, sock: socket.socket, token: bytes) -> None:
        self._selector.unregister(sock)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
            sock.send(token)

    def _accept(self, server: socket.socket, place: Place) -> None:
        sock, _ = server.accept()
        self._stack.enter_context(sock)
        sock.setblocking(False)
        self._selector.register(sock, selectors.EVENT_READ, (self._read, place))

    def _read(self, sock: socket.socket, place: Place) -> None:
        data = sock.recv(_TOKEN)
        if flow := self._tokens.get(data):
            self.arrived.add(Arrival(flow, place))
        if not data and sock.type == socket.SOCK_STREAM:
            self._selector.unregister(sock)
