"""The streams of an instance for somebody attached, from before it starts until it has ended.

Who attaches to an instance that doesn't run is connected while it is launched, between the making of its PID 1 and
its start: nothing of its output can be missed. With `replay` the output comes from the log, from the last start on,
so what was printed before and what is printed now follow each other without gap or repetition.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable

from insula.container.log import LogReader
from insula.container.runtime import Attachment as Stream
from insula.container.runtime import Runtime
from insula.model.errors import InsulaError, NotFound
from insula.model.objects import Exit
from insula.model.stream import Kind

UNKNOWN = 255
_SHORTEST, _LONGEST = 0.005, 0.1  # between looks at a log


def exit_frame(ended: Exit) -> tuple[Kind, bytes]:
    """The last frame; an end that nobody saw counts as failure."""
    status = UNKNOWN if ended.exit_status is None else ended.exit_status
    return Kind.EXIT, json.dumps({"exit_status": status, "signal": ended.signal, "oom": ended.oom}).encode()


async def follow(reader: LogReader, over: Callable[[], bool]) -> AsyncIterator[tuple[int, Kind, bytes]]:
    """(nanoseconds, kind, bytes) from a log as they are written, until `over()` and nothing is left."""
    pause = _SHORTEST
    while True:
        last = over()  # asked before looking: what is written up to the end is still seen
        records = reader.poll()
        for record in records:
            yield record.time_ns, record.kind, record.data
        if records:
            pause = _SHORTEST
        elif last:
            return
        else:
            await asyncio.sleep(pause)
            pause = min(_LONGEST, pause * 1.5)


class Attachment:
    """`ended` is the future of the instance's current start; `connect` joins the streams of the process."""

    def __init__(self, runtime: Runtime, container: str, exec_id: str | None = None, *, stdin: bool) -> None:
        self._runtime = runtime
        self._container = container
        self._exec_id = exec_id
        self._stdin = stdin
        self._stream: asyncio.Future[Stream | None] = asyncio.get_running_loop().create_future()
        self._ended: asyncio.Future[Exit] | None = None
        self.log: LogReader | None = None

    async def connect(self, ended: asyncio.Future[Exit]) -> None:
        """Join the process, whose end `ended` will tell. One whose streams are closed has only its end to tell."""
        stream: Stream | None = None
        with contextlib.suppress(NotFound):
            stream = await self._runtime.attach(self._container, self._exec_id, stdin=self._stdin)
        self._ended = ended
        self._stream.set_result(stream)

    def fail(self, error: InsulaError) -> None:
        """It will not start."""
        if not self._stream.done():
            self._stream.set_exception(error)
            self._stream.exception()  # somebody who never iterates must not be told off for it

    async def send(self, kind: Kind, payload: bytes = b"") -> None:
        """STDIN, STDIN_EOF or RESIZE; waits until the instance is launched."""
        if stream := await asyncio.shield(self._stream):
            await stream.send(kind, payload)

    async def __aiter__(self) -> AsyncIterator[tuple[Kind, bytes]]:
        """STDOUT and STDERR, at last EXIT."""
        stream = await asyncio.shield(self._stream)
        ended = self._ended
        assert ended is not None
        if self.log is not None:
            async for _, kind, data in follow(self.log, ended.done):
                yield kind, data
        elif stream is not None:
            finishing = asyncio.ensure_future(_finish(stream, ended))
            try:
                async for kind, data in stream:
                    yield kind, data
            finally:
                finishing.cancel()
        yield exit_frame(await asyncio.shield(ended))

    def close(self) -> None:
        """Detach; the process goes on."""
        if self._stream.done() and not self._stream.cancelled() and not self._stream.exception():
            stream = self._stream.result()
            if stream is not None:
                stream.close()
        else:
            self._stream.cancel()
        if self.log is not None:
            self.log.close()


async def _finish(stream: Stream, ended: asyncio.Future[Exit]) -> None:
    await asyncio.wait([ended])
    await stream.finish()


def ended_at_once(status: int | None) -> Exit:
    """An end that nobody can tell more of."""
    return Exit(exit_status=status, finished=time.time())
