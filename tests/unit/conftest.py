"""The API on a socket of its own, in a thread, over a control plane in memory."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from insula.api.app import create_app
from insula.api.peer import listen
from insula.api.server import Server
from insula.client import Client
from tests.support.descriptors import descriptors, opened_since
from tests.support.wait import patiently, until
from tests.unit.stub_plane import StubPlane

# how long an example takes says nothing about the code on a machine that does other work as well
settings.register_profile("insula", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("insula")


class StubDaemon:
    """`path` is its socket; `plane` what it serves."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "insulad.sock"
        self.plane = StubPlane(directory)
        self.client = Client(str(self.path), timeout=patiently(20))
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        self.server = Server(create_app(self.plane), lambda: None)
        self._loop = asyncio.get_running_loop()
        sock = listen(self.path)
        self._ready.set()
        await self.server.serve(sockets=[sock])

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(patiently(10))
        assert self.client.tenants.list() == []  # it listens as it does from now on

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self.server.stop.set)
        self._thread.join(patiently(10))
        assert not self._thread.is_alive()


@pytest.fixture(scope="session")
def session_stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StubDaemon]:
    """Making the application takes longer than a test, so there is one for all."""
    daemon = StubDaemon(tmp_path_factory.mktemp("stub"))
    daemon.start()
    yield daemon
    daemon.stop()


@pytest.fixture
def stub(session_stub: StubDaemon) -> Iterator[StubDaemon]:
    """The daemon with an empty plane."""
    session_stub.plane.__init__(session_stub.path.parent)  # type: ignore[misc]
    yield session_stub
    session_stub.plane.kill()
    for process in session_stub.plane.instances.processes_of.values():
        asyncio.run_coroutine_threadsafe(process.drain(), session_stub._loop)


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    """A test closes what it has opened: one process runs thousands of them."""
    before = descriptors()
    yield

    def closed() -> bool:
        gc.collect()  # what only a cycle of references holds is nobody's fault; the cycle may be complete only later
        return not opened_since(before)

    if opened_since(before):
        until(closed, f"what it has opened is closed: {opened_since(before)}")
