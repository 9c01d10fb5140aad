"""The proxy of connections to ports 443 and 80 of leased addresses.

It compares the name that the client asks the server for with the names that the address is leased for.

The rules redirect such connections here; SO_ORIGINAL_DST tells where they were going. A connection whose ClientHello or
request doesn't name an allowed host is reset. After the check of TLS the kernel moves the bytes. The requests of HTTP
are checked one by one, and only the responses are moved by the kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from typing import Final

from insula.network.names.client_hello import ClientHelloReader, NoClientHello
from insula.network.names.http_requests import BadRequest, RequestBegins, RequestReader
from insula.network.names.patterns import normalise
from insula.network.names.permission import permits
from insula.network.names.requests import LessorClient
from insula.network.names.rules import EgressRules
from insula.network.names.splicing import Pipes, SpliceDirection, reset

HTTP: Final = 80
FIRST_BYTES: Final = 15.0  # seconds for the ClientHello or the first request
CONNECT: Final = 20.0  # seconds
PER_CLIENT: Final = 2_000  # connections of an instance
MOST: Final = 16_000  # of a tenant
_PIECE: Final = 1 << 16
_ORIGINAL_DESTINATION: Final = 80  # SO_ORIGINAL_DST, IP6T_SO_ORIGINAL_DST
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 600), (socket.TCP_KEEPINTVL, 60), (socket.TCP_KEEPCNT, 5))


class ConnectionForbidden(Exception):
    """A connection may not go on."""


class RelayedConnection:
    """A connection of a client, and the one to the server."""

    def __init__(self, proxy: Proxy, sock: socket.socket, source: str, client: str) -> None:
        self.client, self.source = client, source
        self.address, self.port = original_destination(sock)
        self.names: set[str] = set()  # that were checked
        self._proxy, self._near = proxy, sock
        self._far = socket.socket(sock.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._far.connect_ex((self.address, self.port))  # nothing is sent before the check; `_connect` waits for this
        self._loop = asyncio.get_running_loop()
        self._directions: list[SpliceDirection] = []
        self._left = 2  # directions that have not ended
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._task: asyncio.Task[None]

    def start(self) -> asyncio.Task[None]:
        """Check the connection and relay it, in a task that ends with it. To cut the connection, cancel the task."""
        self._task = self._loop.create_task(self._run())
        return self._task

    async def _run(self) -> None:
        clean = False
        try:
            if self.port == HTTP:
                await self._relay_requests()
            else:
                await self._relay_tls()
            await self._over
            clean = True
        except (ConnectionForbidden, NoClientHello, BadRequest):
            self._proxy.counters["refused"] += 1
        except (OSError, TimeoutError):
            self._proxy.counters["failed"] += 1
        finally:  # no call of the loop waits for a socket any more, so they can be closed
            for direction in self._directions:
                direction.stop()
            for sock in (self._near, self._far):
                sock.close() if clean else reset(sock)

    async def _relay_tls(self) -> None:
        reader, name = ClientHelloReader(), None
        async with asyncio.timeout(FIRST_BYTES) as limit:
            while name is None:
                if not (data := await self._loop.sock_recv(self._near, _PIECE)):
                    raise ConnectionForbidden("the client has ended before its ClientHello")
                name = reader.feed(data)
            await self._connect(name, limit)
        await self._loop.sock_sendall(self._far, bytes(reader.received))
        self._prepare()
        self._splice(self._near, self._far)
        self._splice(self._far, self._near)

    async def _relay_requests(self) -> None:
        """Send requests on, each after its check; the responses come back from the first on."""
        reader, connected = RequestReader(), False
        async with asyncio.timeout(FIRST_BYTES) as limit:
            while data := await self._loop.sock_recv(self._near, _PIECE):
                for each in reader.feed(data):
                    if isinstance(each, bytes):
                        await self._loop.sock_sendall(self._far, each)
                    elif each.port != self.port:
                        raise ConnectionForbidden("the request is for another port")
                    elif not connected:
                        await self._connect(each.host, limit)
                        limit.reschedule(None)
                        self._prepare()
                        self._splice(self._far, self._near)
                        connected = True
                    else:
                        await self._check(each)
        if not connected:
            raise ConnectionForbidden("the client has ended before its request")
        with contextlib.suppress(OSError):
            self._far.shutdown(socket.SHUT_WR)
        self._ended(True)

    async def _check(self, request: RequestBegins) -> None:
        if request.host.lower() not in self.names:
            await self._allow(request.host)

    async def _allow(self, host: str) -> None:
        """ConnectionForbidden unless the client may connect to this host at the connection's address."""
        name = normalise(host)
        if name is None or not await self._proxy.lessor.check(self.source, self.address, self.port, name):
            raise ConnectionForbidden(f"{host} is not allowed, or not a name of the address")
        self.names.add(name)

    async def _connect(self, host: str, limit: asyncio.Timeout) -> None:
        """Connect to the server, within the time that `limit` is set to."""
        await self._allow(host)
        limit.reschedule(self._loop.time() + CONNECT)
        await self._loop.sock_connect(self._far, (self.address, self.port))

    def _prepare(self) -> None:
        """Send small pieces to the client at once too, and notice when a side is gone."""
        self._near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for sock in (self._near, self._far):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def _splice(self, source: socket.socket, sink: socket.socket) -> None:
        self._directions.append(SpliceDirection(self._proxy.pipes, source, sink, self._ended))

    def _ended(self, clean: bool) -> None:
        self._left -= 1
        if not clean:
            self._task.cancel()
        elif not self._left and not self._over.done():
            self._over.set_result(None)


class Proxy:
    """Accepts the redirected connections of a tenant's instances. `rules` are replaced when others are in force."""

    def __init__(self, lessor: LessorClient) -> None:
        self.lessor = lessor
        self.pipes = Pipes()
        self.rules = EgressRules()
        self.counters: Counter[str] = Counter()
        self._relays: dict[asyncio.Task[None], RelayedConnection] = {}
        self._by_client: Counter[str] = Counter()

    def listen(self, listener: socket.socket) -> None:
        """Accept connections from now on."""
        listener.setblocking(False)
        asyncio.get_running_loop().add_reader(listener.fileno(), self._accept, listener)

    async def cut_forbidden(self) -> None:
        """End connections that the rules no longer allow; they have ended when this returns."""
        cut = []
        for task, relay in list(self._relays.items()):
            where = relay.client, relay.address, relay.port
            moved = self.rules.by_address.get(relay.source) != relay.client
            if moved or not all(permits(self.rules, *where, name) for name in relay.names):
                self.counters["cut"] += 1
                task.cancel()
                cut.append(task)
        if cut:
            await asyncio.wait(cut)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(64):
            try:
                sock, peer = listener.accept()
            except BlockingIOError:
                return
            except OSError:  # the client has gone, or there are too many descriptors
                return
            sock.setblocking(False)
            client = self.rules.by_address.get(peer[0])
            if client is None or len(self._relays) >= MOST or self._by_client[client] >= PER_CLIENT:
                self.counters["refused"] += 1
                reset(sock)
                continue
            try:
                relay = RelayedConnection(self, sock, peer[0], client)
            except OSError:  # the connection was not redirected, or there are too many descriptors
                reset(sock)
                continue
            task = relay.start()
            self._relays[task] = relay
            self._by_client[client] += 1
            task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        client = self._relays.pop(task).client
        self._by_client[client] -= 1
        if not self._by_client[client]:
            del self._by_client[client]


def original_destination(sock: socket.socket) -> tuple[str, int]:
    """Return the address and port that a redirected connection was going to. OSError if it was not redirected."""
    if sock.family == socket.AF_INET6:
        packed = sock.getsockopt(socket.IPPROTO_IPV6, _ORIGINAL_DESTINATION, 28)
        found = socket.inet_ntop(socket.AF_INET6, packed[8:24]), int.from_bytes(packed[2:4], "big")
    else:
        packed = sock.getsockopt(socket.SOL_IP, _ORIGINAL_DESTINATION, 16)
        found = socket.inet_ntop(socket.AF_INET, packed[4:8]), int.from_bytes(packed[2:4], "big")
    if found == sock.getsockname()[:2]:
        raise OSError("the connection was not redirected")
    return found
