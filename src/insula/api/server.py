"""The HTTP server: uvicorn, stopped by an event, with the credentials of each connection."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from litestar.types import ASGIApp

from insula.api.peer import BACKLOG, PeerProtocol

GRACE = 5
"""Seconds until requests that ignore the end are abandoned; `Gate` ends them earlier."""
MAX_HEAD = 64 << 10
_ACCEPTED = 16  # connections in a row, before others have their turn


def notify(state: str) -> None:
    """Tells systemd, if it started us (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock, contextlib.suppress(OSError):
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        sock.send(state.encode())


class Server(uvicorn.Server):
    """uvicorn, stopped by an event instead of by signals of its own, and without its tick ten times a second."""

    def __init__(self, app: ASGIApp, begin: Callable[[], None]) -> None:
        """`begin` is called once requests are answered."""
        super().__init__(
            uvicorn.Config(
                app,
                http=PeerProtocol,
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                h11_max_incomplete_event_size=MAX_HEAD,
                timeout_graceful_shutdown=GRACE,
                backlog=_ACCEPTED,  # asyncio accepts as many at once as may wait
            )
        )
        self.stop = asyncio.Event()
        self.begin = begin

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.lifespan.state["stopping"] = self.stop  # every request's scope has it as state
        await super().startup(sockets=sockets)
        for sock in sockets or ():
            sock.listen(BACKLOG)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        await self.on_tick(0)
        notify("READY=1")
        self.begin()
        await self.stop.wait()
        notify("STOPPING=1")
