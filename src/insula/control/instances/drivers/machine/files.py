"""Files in and out of a machine: tar streams of a process in the guest, which the agent starts (`insula.agent.files`).

insulad passes the bytes on, and unpacks nothing: a guest may send anything. Who unpacks an archive of a machine, such
as `insula cp`, confines it as it does for containers, whose files are as hostile.
"""

from __future__ import annotations

import asyncio
import json
import os
from asyncio.streams import FlowControlMixin
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, Final, TypeVar

from insula.control.instances.drivers.base import Running
from insula.control.instances.drivers.machine.shim import ask
from insula.kernel import process
from insula.kernel.cgroups import Cgroup
from insula.kernel.cgroups.hierarchy import of_process
from insula.model.errors import Conflict, Failed, InsulaError, NotFound, from_dict

T = TypeVar("T")
SILENT: Final = 60.0
"""Seconds for a guest to send or take the next piece, or to end: one that may be busy, and may have stopped."""
_BUFFER: Final = 1 << 18
_SAID: Final = 16 << 10  # bytes of an error
_SHOWN: Final = 500  # characters of each part of it


class GuestArchive:
    """An archive from or to a guest; see `Archive`. `answer` is what the shim says at its end. Failed if the guest is
    silent for too long."""

    def __init__(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        said: asyncio.StreamReader,
        answer: asyncio.Future[dict[str, Any] | None],
    ) -> None:
        self._source, self._sink, self._answer = source, sink, answer
        self._said = asyncio.ensure_future(_all_of(said))

    async def read(self) -> bytes:
        return await _within(self._source.read(_BUFFER))

    async def write(self, data: bytes) -> None:
        self._sink.write(data)
        await _within(self._sink.drain())

    async def finish(self) -> None:
        """Wait for its end. The error is the guest's own."""
        self._sink.close()
        answer, said = await _within(self._answer), await _within(self._said)
        if answer is None:
            raise NotFound("the machine ended meanwhile", "try again")
        if answer.get("status") != 0:
            raise error_of(said, answer)

    def close(self) -> None:
        self._sink.close()
        self._said.cancel()
        self._answer.cancel()  # its connection is closed with it, and the shim ends the process in the guest


@asynccontextmanager
async def opened(verb: str, machine: Running, path: str, copy: str | None) -> AsyncIterator[GuestArchive]:
    """Start a process that copies in the guest. NotFound if the machine has ended, Conflict if it is paused."""
    async with AsyncExitStack() as stack:
        try:
            netns = process.open_namespace(machine.pid, machine.start_time, "net")
        except (ProcessLookupError, FileNotFoundError):
            raise NotFound("the machine ended meanwhile", "try again") from None
        if (group := of_process(machine.pid)) and Cgroup(group).frozen():
            os.close(netns)
            raise Conflict("the machine is paused, and only its own kernel can read its files", "unpause it first")
        (stdin, to_guest), (from_guest, stdout), (errors, stderr) = os.pipe(), os.pipe(), os.pipe()
        question = {"archive": verb, "path": path, "copy": copy}
        answer = asyncio.ensure_future(ask(netns, question, [stdin, stdout, stderr]))
        for fd in (stdin, stdout, stderr):
            answer.add_done_callback(lambda _, fd=fd: os.close(fd))  # type: ignore[misc]
        source, said = await _reader(from_guest, stack), await _reader(errors, stack)
        archive = GuestArchive(source, await _writer(to_guest), said, answer)
        stack.callback(archive.close)
        yield archive


def error_of(said: bytes, answer: dict[str, Any]) -> InsulaError:
    """The error that a process in a guest has reported, which may be anything."""
    with suppress(ValueError, RecursionError):
        found = json.loads(said)
        if isinstance(found, dict) and isinstance(found.get("message"), str):
            return from_dict({key: str(found.get(key) or "")[:_SHOWN] for key in ("error", "message", "hint")})
    return Failed(f"the copy in the machine failed: {str(answer)[:_SHOWN]}", "look at the log of the machine")


async def _within(work: Awaitable[T]) -> T:
    """What the guest has its part in. Failed if that takes too long."""
    try:
        async with asyncio.timeout(SILENT):
            return await work
    except TimeoutError:
        what = f"the machine does not answer: its system has done nothing for the copy in {SILENT:g} s"
        raise Failed(what, "look at its log and its load, and try again") from None


async def _reader(fd: int, stack: AsyncExitStack) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(_BUFFER)
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, os.fdopen(fd, "rb", 0))
    stack.callback(transport.close)
    return reader


async def _writer(fd: int) -> asyncio.StreamWriter:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.connect_write_pipe(FlowControlMixin, os.fdopen(fd, "wb", 0))
    return asyncio.StreamWriter(transport, protocol, None, loop)


async def _all_of(reader: asyncio.StreamReader) -> bytes:
    """What comes, of which only the beginning is kept."""
    kept = b""
    while data := await reader.read(_BUFFER):
        kept = (kept + data)[:_SAID]
    return kept
