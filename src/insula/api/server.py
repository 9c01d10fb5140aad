"""The HTTP server: uvicorn, stopped by an event, with the credentials of each connection."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import uvicorn
from litestar.types import ASGIApp

from insula.api.peer import BACKLOG, GateProtocol, Peer, PeerProtocol, group_id
from insula.api.tls.record import ClientRecord

GRACE = 5
"""Seconds until the server stops waiting for requests; `AccessMiddleware` ends them earlier."""
_ACCEPTED = 16  # connections that are accepted before other tasks may run


def notify(state: str) -> None:
    """Send a message to systemd, if it started this process (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock, contextlib.suppress(OSError):
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        sock.send(state.encode())


class GateSocket(NamedTuple):
    """A socket that serves requests from the gate of HTTPS, which runs as `user`."""

    socket: socket.socket
    user: int


class Server(uvicorn.Server):
    """A uvicorn server that is stopped by an event instead of signals, and does not wake up ten times a second."""

    def __init__(
        self,
        app: ASGIApp,
        begin: Callable[[], None],
        gate: GateSocket | None = None,
        malformed: Callable[[Peer | None, ClientRecord | None], None] | None = None,
    ) -> None:
        """`begin` is called when requests are being served. `gate` is the socket for the gate of HTTPS. `malformed` is
        called with the sender of what is not HTTP."""
        super().__init__(
            uvicorn.Config(
                app,
                http=PeerProtocol,
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                timeout_graceful_shutdown=GRACE,
                backlog=_ACCEPTED,  # asyncio accepts as many at once as the backlog has
            )
        )
        self.stop = asyncio.Event()
        self.gate = gate
        self.malformed = malformed
        self.begin = begin

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.lifespan.state["stopping"] = self.stop  # every request's scope has it as state
        self.lifespan.state["group"] = group_id()
        self.lifespan.state["malformed"] = self.malformed
        await super().startup(sockets=sockets)
        if self.gate is not None:
            loop = asyncio.get_running_loop()
            self.servers.append(await loop.create_unix_server(self._gate_protocol, sock=self.gate.socket))
            sockets = [*(sockets or ()), self.gate.socket]
        for sock in sockets or ():
            sock.listen(BACKLOG)

    def _gate_protocol(self) -> GateProtocol:
        assert self.gate is not None
        state = {**self.lifespan.state, "gate": self.gate.user}
        return GateProtocol(config=self.config, server_state=self.server_state, app_state=state)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        await self.on_tick(0)
        notify("READY=1")
        self.begin()
        await self.stop.wait()
        notify("STOPPING=1")
