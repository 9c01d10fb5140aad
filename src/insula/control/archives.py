"""`insula cp`: trees in and out of instances, running or not, as tar streams.

Files are reached through PID 1's root. For an instance that doesn't run, a container is made for the moment whose
PID 1 just sleeps: it has the root file system just as the instance would, and vanishes afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import IO

from insula.container import archive
from insula.control.supervisor import Member, Supervisor
from insula.model.errors import Conflict, Invalid
from insula.model.units import shorten

_CHUNK = 1 << 17


class Archives:
    def __init__(self, supervisor: Supervisor) -> None:
        self.engine = supervisor.engine
        self.supervisor = supervisor

    async def get(self, member: Member, path: str) -> AsyncIterator[bytes]:
        """The file or tree at `path` as a tar in pieces. NotFound, Invalid before the first piece."""
        check(path)
        async with self._root(member) as (pid, started):
            reading, theirs = os.pipe()
            ours = os.fdopen(reading, "rb", buffering=0)

            def work() -> None:
                with os.fdopen(theirs, "wb") as sink, archive.opened(pid, started, member.tenant.id_base) as tree:
                    archive.write(tree, path, sink)

            async with _beside(work, ours) as task:
                while piece := await asyncio.to_thread(ours.read, _CHUNK):
                    yield piece
                await task

    async def put(self, member: Member, path: str, pieces: AsyncIterator[bytes]) -> None:
        """Unpacks a tar into the directory `path`."""
        check(path)
        if member.instance.spec.read_only and not member.active:
            raise Conflict(f"instance {member.instance.name} is read-only", "make it without --read-only")
        async with self._root(member) as (pid, started):
            theirs, writing = os.pipe()
            ours = os.fdopen(writing, "wb", buffering=0)

            def work() -> None:
                with os.fdopen(theirs, "rb") as source, archive.opened(pid, started, member.tenant.id_base) as tree:
                    archive.read(tree, path, source)
                    while source.read(_CHUNK):  # what follows the archive's end
                        pass

            async with _beside(work, ours) as task:
                with contextlib.suppress(BrokenPipeError):  # it has failed, and says why
                    async for piece in pieces:
                        await asyncio.to_thread(_write_all, ours, piece)
                ours.close()
                await task

    @asynccontextmanager
    async def _root(self, member: Member) -> AsyncIterator[tuple[int, int]]:
        """PID and start time of a process whose root is the instance's."""
        status = member.status
        if status.state in ("running", "paused", "stopping") and status.pid and status.start_time:
            yield status.pid, status.start_time
            return
        async with member.lock:
            if member.active:
                raise Conflict(f"instance {member.instance.name} is just starting", "try again")
            await member.settled()
            launcher, container = self.supervisor.launcher, secrets.token_hex(16)
            request = await launcher.resting(member.tenant, member.instance, container)
            try:
                state = await self.engine.runtime.create(request)
                await self.engine.runtime.start(container)
                yield state.pid, state.start_time
            finally:
                await asyncio.shield(self.supervisor.spawn(self.engine.runtime.delete(container)))


@asynccontextmanager
async def _beside(work: Callable[[], None], ours: IO[bytes]) -> AsyncIterator[asyncio.Future[None]]:
    """`work` at the other end of the pipe `ours`, which is closed at last, so that it ends in any case.

    It has a thread of its own: one of a pool could wait for another that waits for it.
    """
    executor = ThreadPoolExecutor(1, "insula-cp")
    task = asyncio.get_running_loop().run_in_executor(executor, work)
    try:
        yield task
    finally:
        ours.close()
        await asyncio.wait([task])
        executor.shutdown(wait=False)
        if not task.cancelled():
            task.exception()  # raised by whoever awaited it; here nobody is interested any more


def check(path: str) -> None:
    if not path.startswith("/") or "\0" in path or len(path) > 4095:
        raise Invalid(f"{shorten(path)} is no absolute path in an instance", "begin it with /")


def _write_all(file: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
