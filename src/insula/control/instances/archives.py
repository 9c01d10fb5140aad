"""`insula cp` and `export`: trees in and out of instances, running or not, as tar streams.

Files are reached through PID 1's root. For an instance that doesn't run, a container is made for the moment whose
PID 1 just sleeps: it has the root file system just as the instance would, and vanishes afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from insula.container import archive_worker
from insula.control.instances.supervisor import Member, Supervisor
from insula.model.errors import Conflict, Invalid
from insula.model.units import shorten


class Archives:
    def __init__(self, supervisor: Supervisor) -> None:
        self.context = supervisor.context
        self.supervisor = supervisor

    async def get(self, member: Member, path: str) -> AsyncIterator[bytes]:
        """The file or tree at `path` as a tar in pieces. NotFound, Invalid before the first piece."""
        check(path)
        async for piece in self._pieces(member, "write", path):
            yield piece

    async def export(self, member: Member) -> AsyncIterator[bytes]:
        """The root file system as a tar in pieces, without what is mounted in it."""
        async for piece in self._pieces(member, "export", "/"):
            yield piece

    async def _pieces(self, member: Member, verb: str, path: str) -> AsyncIterator[bytes]:
        async with self._root(member) as process, archive_worker.started(verb, *process, path) as worker:
            while piece := await worker.read():
                yield piece
            await worker.finish()

    async def put(self, member: Member, path: str, pieces: AsyncIterator[bytes], copy: str | None = None) -> None:
        """Unpacks a tar into the directory `path`, or where `copy` says (`container.archive.read`)."""
        check(path)
        if copy not in (None, "tree", "content"):
            raise Invalid(f"nothing is copied as {shorten(copy)}", "choose tree or content")
        if member.instance.spec.read_only and not member.active:
            raise Conflict(f"instance {member.instance.name} is read-only", "make it without --read-only")
        async with self._root(member) as process, archive_worker.started("read", *process, path, copy) as worker:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has failed, and says why
                async for piece in pieces:
                    await worker.write(piece)
            await worker.finish()

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
                state = await self.context.runtime.create(request)
                await self.context.runtime.start(container)
                yield state.pid, state.start_time
            finally:
                await asyncio.shield(self.supervisor.spawn(self.context.runtime.delete(container)))


def check(path: str) -> None:
    if not path.startswith("/") or "\0" in path or len(path) > 4095:
        raise Invalid(f"{shorten(path)} is no absolute path in an instance", "begin it with /")
