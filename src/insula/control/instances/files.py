"""`insula cp` and `export`: copies trees into and out of instances as tar streams.

Files are reached through the root of the instance's first process. For an instance that doesn't run, the driver starts
a holder process with its root file system meanwhile (`Driver.holder`).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from insula.control.context import Context
from insula.control.instances.drivers.base import Driver, Running, require
from insula.control.instances.holders import holder_named
from insula.control.instances.managed import ManagedInstance, ManagedInstances
from insula.control.networks.ports import Ports
from insula.model.errors import Conflict, Invalid
from insula.model.rules import MAX_PATH
from insula.model.units import shorten


class Files:
    def __init__(self, ports: Ports, context: Context, managed: ManagedInstances) -> None:
        self.context = context
        self.managed = managed
        self.ports = ports

    async def get(self, managed: ManagedInstance, path: str) -> AsyncIterator[bytes]:
        """The file or tree at `path`, as the pieces of a tar. NotFound, Invalid before the first piece."""
        check(path)
        async for piece in self._pieces(managed, "write", path):
            yield piece

    async def export(self, managed: ManagedInstance) -> AsyncIterator[bytes]:
        """The root file system, as the pieces of a tar. File systems that are mounted in it are left out."""
        async for piece in self._pieces(managed, "export", "/"):
            yield piece

    async def _pieces(
        self, managed: ManagedInstance, verb: Literal["write", "export"], path: str
    ) -> AsyncIterator[bytes]:
        async with self._root(managed) as process, self._driver(managed).archive(verb, process, path) as worker:
            while piece := await worker.read():
                yield piece
            await worker.finish()

    async def put(
        self, managed: ManagedInstance, path: str, pieces: AsyncIterator[bytes], copy: str | None = None
    ) -> None:
        """Unpack a tar into the directory `path`; `copy` chooses the target as in `container.archive.read`. Invalid,
        Conflict."""
        check(path)
        if copy not in (None, "tree", "content"):
            raise Invalid(f"copy mode {shorten(copy)} is unknown", "choose tree or content")
        if managed.instance.spec.read_only and not managed.active:
            raise Conflict(f"instance {managed.instance.name} is read-only", "make it without --read-only")
        async with self._root(managed) as process, self._driver(managed).archive("read", process, path, copy) as worker:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has failed; `finish` raises why
                async for piece in pieces:
                    await worker.write(piece)
            await worker.finish()

    @asynccontextmanager
    async def _root(self, managed: ManagedInstance) -> AsyncIterator[Running]:
        """A process whose root is the instance's. Unavailable if its driver has no files."""
        require(self._driver(managed), "files")
        status = managed.status
        if status.state in ("running", "paused", "stopping") and status.pid and status.start_time:
            yield Running(status.pid, status.start_time)
            return
        async with managed.lock:
            if managed.active:
                raise Conflict(f"instance {managed.instance.name} is just starting", "try again")
            networks = [place.network for place in await self.ports.places(managed.instance)]
            with holder_named(self.managed, managed.instance.tenant):
                async with self._driver(managed).holder(managed.tenant, managed.instance, networks) as process:
                    yield process

    def _driver(self, managed: ManagedInstance) -> Driver:
        return self.context.driver(managed.instance)


def check(path: str) -> None:
    if not path.startswith("/") or "\0" in path or len(path) > MAX_PATH:
        raise Invalid(f"{shorten(path)} is not an absolute path in an instance", "begin it with /")
