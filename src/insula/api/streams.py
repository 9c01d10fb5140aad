"""Streamed bodies: JSON lines and frames to the client, archives in both directions.

An error after the start of the response can't change its status any more, so it is sent in the stream, as a problem:
the last JSON line, a frame of kind ERROR, or an event of type `error`. An archive is cut off; the client detects that,
because a chunked body without its last chunk is incomplete (RFC 9112, 8).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from litestar import Request
from litestar.response import Stream

from insula.api.audit import note
from insula.api.authorization import hold
from insula.api.narrowing import for_sender
from insula.api.patience import LEAST, STALL
from insula.api.redaction import problem_of
from insula.control.identities.authority import Authority
from insula.image.limits import MAX_SIZE as MAX_UPLOAD
from insula.image.limits import check_room
from insula.model.errors import Failed, InsulaError, Invalid, defect
from insula.model.stream import Kind, encode

T = TypeVar("T")
log = logging.getLogger("insula.api")
NDJSON = "application/x-ndjson"
FRAMES = "application/vnd.insula.frames"
EVENTS = "text/event-stream"
TAR = "application/x-tar"
BYTES = "application/octet-stream"
PNG = "image/png"
_ENDS: dict[str, Callable[[bytes], bytes]] = {
    NDJSON: lambda problem: problem + b"\n",
    FRAMES: lambda problem: encode(Kind.ERROR, problem),
    EVENTS: lambda problem: b"event: error\ndata: " + problem + b"\n\n",
}
"""How a problem is sent at the end of a stream, by its media type."""
_TURN = 32  # items before other tasks may run


def json_lines(items: AsyncIterator[Any], authority: Authority) -> Stream:
    """Encode what the sender may see of each item as one line of JSON, as soon as it arrives."""

    async def lines() -> AsyncIterator[bytes]:
        try:
            number = 0
            async for item in items:
                yield msgspec.json.encode(for_sender(item, authority)) + b"\n"
                number += 1
                if number % _TURN == 0:  # ten thousand events may be available at once: let other tasks run
                    await asyncio.sleep(0)
        except Exception as error:
            yield last_piece(NDJSON, error)

    return Stream(lines(), media_type=NDJSON)


def frames(pieces: AsyncIterator[bytes]) -> Stream:
    """Pass pieces that are frames of `insula.model.stream`; an error becomes the last frame."""

    async def encoded() -> AsyncIterator[bytes]:
        try:
            async for piece in pieces:
                yield piece
        except Exception as error:
            yield last_piece(FRAMES, error)

    return Stream(encoded(), media_type=FRAMES)


def archive(pieces: AsyncIterator[bytes]) -> Stream:
    """Pass the pieces of a tar."""
    return Stream(pieces, media_type=TAR)


async def merged(*sources: AsyncIterator[T]) -> AsyncIterator[T]:
    """Merge the items of several iterators as they arrive, until one of them ends or fails."""
    pending = {asyncio.ensure_future(anext(source)): source for source in sources}
    try:
        while True:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                source = pending.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    return
                pending[asyncio.ensure_future(anext(source))] = source
                yield item
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


async def primed(items: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Wait for the first item, and return an iterator over all: an early error is raised here, with its status."""
    try:
        first = await anext(items)
    except StopAsyncIteration:

        async def nothing() -> AsyncIterator[Any]:
            return
            yield

        return nothing()

    async def rest() -> AsyncIterator[Any]:
        yield first
        async for item in items:
            yield item

    return rest()


def last_piece(media: str, error: BaseException) -> bytes:
    """Return an error as the end of a stream of a media type; empty for one that has no place for it. It is noted."""
    return end_of(media, _as_insula_error(error))


def end_of(media: str, error: InsulaError) -> bytes:
    """Return `last_piece`, and note nothing."""
    encoded = _ENDS.get(media.partition(";")[0])
    return encoded(msgspec.json.encode(problem_of(error))) if encoded else b""


def _as_insula_error(error: BaseException) -> InsulaError:
    """Return an InsulaError unchanged; another error is a defect, which is logged and becomes Failed."""
    note(error=type(error).__name__)
    if isinstance(error, InsulaError):
        return error
    log.error("in a stream", exc_info=error)
    return defect(error)


async def upload(request: Request[Any, Any, Any], limit: int = MAX_UPLOAD) -> AsyncIterator[bytes]:
    """Yield the request's body in pieces, which are counted in the tenant's quota of uploads until the request ends.
    Failed if the client disconnects early, Invalid beyond `limit` bytes or if it is too slow, QuotaExceeded."""
    in_flight = request.app.state.plane.context.in_flight
    held = hold(request.scope, in_flight.of_tenant(str(request.path_params["tenant"]), "upload_bytes"))
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and len(announced) < 20:
        held.take(int(announced))
    size = 0
    async for piece in _pieces(request):
        size += len(piece)
        if size > limit:
            raise Invalid(f"the upload exceeds {limit} bytes", "send less")
        if not announced:
            held.take(len(piece))
        if piece:
            yield piece


async def _pieces(request: Request[Any, Any, Any]) -> AsyncIterator[bytes]:
    """Yield the pieces of the request's body. Failed if the client disconnects early, Invalid if it is too slow."""
    size, loop = 0, asyncio.get_running_loop()
    until = loop.time() + STALL
    while True:
        try:
            async with asyncio.timeout_at(until):
                message = await request.receive()
        except TimeoutError:
            raise Invalid(f"the upload brought no {LEAST >> 10} KiB in {STALL:g} s", "send it faster") from None
        if message["type"] != "http.request":
            raise Failed("the upload was interrupted", "send it again")
        size += len(message["body"])
        if size >= LEAST:
            size, until = 0, loop.time() + STALL
        yield message["body"]
        if not message["more_body"]:
            return


@asynccontextmanager
async def spooled(request: Request[Any, Any, Any], directory: Path) -> AsyncIterator[Path]:
    """Write the request's body to an unnamed file (O_TMPFILE), which never stays behind."""
    fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        async for piece in upload(request):
            try:
                await asyncio.to_thread(_write_all, fd, piece)
            except OSError as error:
                raise Failed(f"the upload can't be stored: {error.strerror}", "free some space on the disk") from None
        os.lseek(fd, 0, os.SEEK_SET)
        yield Path(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


async def while_connected(request: Request[Any, Any, Any], work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, which is cancelled if the client disconnects. The request's body was read before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise Failed("the client disconnected", "try again")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    check_room(fd, "storing an upload")
    while view:
        view = view[os.write(fd, view) :]
