"""The API on a socket of its own, in a thread, over a cloud in memory."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from insula.api.app import create_app
from insula.api.peer import listen
from insula.api.server import Server
from insula.client import Client
from tests.unit.stub_cloud import StubCloud


class StubDaemon:
    """`path` is its socket; `cloud` what it serves."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "insulad.sock"
        self.cloud = StubCloud(directory)
        self.client = Client(str(self.path), timeout=20)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        self.server = Server(create_app(self.cloud))
        self._loop = asyncio.get_running_loop()
        sock = listen(self.path)
        self._ready.set()
        await self.server.serve(sockets=[sock])

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self.server.stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[StubDaemon]:
    daemon = StubDaemon(tmp_path)
    daemon.start()
    yield daemon
    daemon.stop()
