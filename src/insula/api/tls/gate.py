"""The gate: the process in which TLS ends. It runs as a user without rights, and knows nothing but its sockets.

It gets what it works with by descriptors, which a line of JSON on its standard input names: the listening sockets, its
certificate and key. For each connection of the network, after the handshake (TLS 1.3 only;
a client's certificate is optional, and of Insula's own authority), it connects to insulad's socket, sends the record of
the connection, and passes bytes in both directions.

Limits of one connection and of one address keep a flood from taking its descriptors: see the constants. Handshakes that
fail are told on the standard output, one line of JSON each, for the audit log.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import ssl
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from insula.api.tls.record import ClientRecord
from insula.kernel import syscalls

HANDSHAKE = 5.0
"""Seconds for a handshake."""
HANDSHAKES = 64
"""Handshakes at a time. Further connections wait to be accepted."""
CONNECTIONS = 1024
"""Connections at a time."""
HANDSHAKES_OF_ADDRESS = 16
"""Handshakes at a time of one address: a quarter of them, so that no address can hold all."""
OF_ADDRESS = 128
"""Connections at a time of one IPv4 address, or of one IPv6 network of 64 bits."""


class Gate:
    """Accepts on `listeners`; `target` is the path of insulad's socket for it."""

    def __init__(self, listeners: list[socket.socket], context: ssl.SSLContext, target: str) -> None:
        self.listeners = listeners
        self.context = context
        self.target = target
        self._handshakes = asyncio.Semaphore(HANDSHAKES)
        self._connections = asyncio.Semaphore(CONNECTIONS)
        self._of_address: Counter[str] = Counter()
        self._shaking: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Accept connections until SIGTERM, and return when the last one has ended."""
        accepting = [asyncio.create_task(self._accept(each)) for each in self.listeners]
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._finish, accepting)
        await asyncio.gather(*accepting, return_exceptions=True)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _finish(self, accepting: list[asyncio.Task[None]]) -> None:
        for task in accepting:
            task.cancel()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._connections.acquire()
            await self._handshakes.acquire()
            try:
                sock, address = await loop.sock_accept(listener)
            except OSError as error:  # EMFILE, or a client that has gone already
                self._handshakes.release()
                self._connections.release()
                tell(event="accept", error=str(error))
                await asyncio.sleep(0.1)
                continue
            task = asyncio.create_task(self._connection(sock, str(address[0]), int(address[1])))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connection(self, sock: socket.socket, address: str, port: int) -> None:
        source = source_of(address)
        try:
            with counted(self._of_address, source):
                try:
                    client = await self._admitted(sock, address, source)
                finally:
                    self._handshakes.release()
                if client:
                    await self._pass(*client, address, port)
        finally:
            self._connections.release()

    async def _admitted(self, sock: socket.socket, address: str, source: str) -> tuple[Relay, asyncio.Transport] | None:
        """Return the client's side of the plain bytes; None if the source has too many, or the handshake fails."""
        with counted(self._shaking, source):
            if self._of_address[source] > OF_ADDRESS or self._shaking[source] > HANDSHAKES_OF_ADDRESS:
                sock.close()
                return None
            return await self._handshake(sock, address)

    async def _handshake(self, sock: socket.socket, address: str) -> tuple[Relay, asyncio.Transport] | None:
        """Return the client's side of the plain bytes; None if the handshake failed, which is told."""
        loop = asyncio.get_running_loop()
        relay = Relay()
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: relay, sock, ssl=self.context, ssl_handshake_timeout=HANDSHAKE
            )
        except OSError as error:  # also TimeoutError, and SSLError
            reason = getattr(error, "reason", None) or type(error).__name__
            detail = getattr(error, "verify_message", None)
            tell(event="handshake", address=address, error=f"{reason}: {detail}" if detail else str(reason))
            return None
        return relay, transport

    async def _pass(self, requests: Relay, client: asyncio.Transport, address: str, port: int) -> None:
        """Connect to insulad, and pass bytes both ways until both sides have ended."""
        of_tls: ssl.SSLObject = client.get_extra_info("ssl_object")
        record = ClientRecord(address, port, of_tls.version() or "", of_tls.getpeercert(binary_form=True))
        answers = Relay()
        try:
            insulad, _ = await asyncio.get_running_loop().create_unix_connection(lambda: answers, self.target)
            insulad.write(record.encode())
            requests.begin(insulad)
            answers.begin(client)
            await asyncio.wait((requests.ended, answers.ended))
        except OSError as error:
            tell(event="insulad", error=str(error))
        finally:
            client.close()


class Relay(asyncio.Protocol):
    """One side of a connection: passes what it receives to the other side, and ends that when it ends. While there is
    too much to be written here, nothing is read there."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._early = bytearray()
        self._here: asyncio.Transport | None = None
        self._there: asyncio.Transport | None = None

    def begin(self, there: asyncio.Transport) -> None:
        """Pass what has come, and what comes."""
        self._there = there
        there.write(self._early)
        if self.ended.done():
            there.close()
        elif self._here is not None:
            self._here.resume_reading()

    def connection_made(self, transport: Any) -> None:
        self._here = transport

    def data_received(self, data: bytes) -> None:
        if self._there is not None:
            self._there.write(data)
        else:
            self._early += data
            if self._here is not None:
                self._here.pause_reading()

    def pause_writing(self) -> None:
        if self._there is not None:
            self._there.pause_reading()

    def resume_writing(self) -> None:
        if self._there is not None:
            self._there.resume_reading()

    def connection_lost(self, _: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)
        if self._there is not None:
            self._there.close()


@contextlib.contextmanager
def counted(counter: Counter[str], key: str) -> Iterator[None]:
    """Count one more of `key` while the block runs."""
    counter[key] += 1
    try:
        yield
    finally:
        counter[key] -= 1
        if not counter[key]:
            del counter[key]


def source_of(address: str) -> str:
    """Return what counts as one source: an IPv4 address, or the first 64 bits of an IPv6 one."""
    if ":" not in address:
        return address
    return socket.inet_pton(socket.AF_INET6, address.partition("%")[0])[:8].hex()


def tell(**event: Any) -> None:
    """Write an event for insulad. If it doesn't read them, they are lost, and nothing waits."""
    line = json.dumps({"time": time.time(), **event}).encode() + b"\n"
    with contextlib.suppress(OSError):
        os.write(sys.stdout.fileno(), line)


def make_context(certificate: Path, key: Path, clients: Path) -> ssl.SSLContext:
    """Make the context of the server. `clients` has the authorities of clients' certificates, which are optional."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(clients)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.num_tickets = 0  # a resumed session would not prove the certificate again
    return context


def drop_rights(user: int, parent: int) -> None:
    """Become a user without rights, for ever (setresuid(2), prctl(2)), and end with the process `parent`."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)  # which setresuid(2) has cleared: it ends with insulad
    if os.getppid() != parent:
        os._exit(1)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)  # neither ptrace(2) nor a core file shows the key
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def main() -> None:
    """Run the gate with the work that insulad wrote as one line of JSON to the standard input."""
    work = json.loads(sys.stdin.buffer.readline())
    listeners = [socket.socket(fileno=fd) for fd in work["listeners"]]
    for listener in listeners:
        listener.setblocking(False)
    files = (Path(f"/proc/self/fd/{work[name]}") for name in ("certificate", "key", "clients"))
    context = make_context(*files)
    for name in ("certificate", "key", "clients"):
        os.close(work[name])
    os.set_blocking(sys.stdout.fileno(), False)
    drop_rights(work["user"], work["parent"])
    tell(event="ready")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(Gate(listeners, context, work["target"]).serve())


if __name__ == "__main__":
    main()
