"""`AttachSession`: the streams of an instance for an attached client, from before it starts until it has ended.

A client that attaches to an instance that doesn't run is connected during its launch, between the creation of its PID 1
and its start. So it misses no output. With `replay` the output of the last start is read from the log first; the live
output follows without gap or repetition.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import TypeVar

from insula.control.instances.drivers.base import Driver, Log, LogRecord, Streams
from insula.control.workers import in_thread
from insula.model.errors import InsulaError, NotFound, Unavailable
from insula.model.objects import Exit
from insula.model.stream import Kind

T = TypeVar("T")
UNKNOWN = 255
_TURN = 32  # pieces that are sent before other tasks may run
_readers = ThreadPoolExecutor(2, "insula-log")
_SHORTEST, _LONGEST = 0.005, 0.1  # seconds between reads of a log
_PATIENCE = 10.0  # seconds that a starting monitor may take


def exit_frame(ended: Exit) -> tuple[Kind, bytes]:
    """The last frame of a stream. An unknown exit status counts as failure."""
    status = UNKNOWN if ended.exit_status is None else ended.exit_status
    return Kind.EXIT, json.dumps({"exit_status": status, "signal": ended.signal, "oom": ended.oom}).encode()


async def in_reader(work: Callable[[], T]) -> T:
    """Run `work`, which reads a log, in a thread, and return its result. There are few such threads: reading millions
    of small records takes a second of CPU time, which must not delay requests of others.

    A caller that is cancelled first waits for the thread, which still uses the log.
    """
    return await in_thread(_readers, work)


async def follow(reader: Log, over: Callable[[], bool]) -> AsyncIterator[list[LogRecord]]:
    """The records of a log in batches, as they are written, until `over()` is true and all were returned."""
    pause = _SHORTEST
    while True:
        last = over()  # asked before reading, so that the last records are not missed
        records = await in_reader(reader.poll)
        if records:
            pause = _SHORTEST
            yield records
        elif last:
            return
        else:
            await asyncio.sleep(pause)
            pause = min(_LONGEST, pause * 1.5)


def merge(records: Sequence[LogRecord]) -> Iterator[tuple[Kind, bytes]]:
    """The output in the records. Successive records of one kind are joined."""
    for kind, group in groupby(records, lambda record: record.kind):
        yield kind, b"".join(record.data for record in group)


class AttachSession:
    """The streams of an instance's current start, or of a process that exec started. It has one reader.

    `log` opens the log at the beginning of that start; processes of exec have none. If the monitor dies, the rest of
    the output is read from the log, so nothing is lost or repeated. The exit frame is sent only when `after` is set, if
    it is given: after the end of a `--rm` instance its name is free again.
    """

    def __init__(
        self,
        driver: Driver,
        instance_id: str,
        exec_id: str | None = None,
        *,
        stdin: bool,
        replay: bool = False,
        log: Callable[[], Log] | None = None,
        after: asyncio.Event | None = None,
    ) -> None:
        self._driver = driver
        self._instance_id = instance_id
        self._exec_id = exec_id
        self._stdin = stdin
        self._replay = replay
        self._log = log
        self._after = after
        self._stream: asyncio.Future[Streams | None] = asyncio.get_running_loop().create_future()
        self._ended: asyncio.Future[Exit] | None = None
        self._fresh = False

    async def connect(self, ended: asyncio.Future[Exit], *, fresh: bool) -> None:
        """Connect to the streams of the process; `ended` gets its exit. A process that isn't `fresh` may have closed
        its streams already; then only the exit is delivered."""
        deadline = time.monotonic() + _PATIENCE
        stream: Streams | None = None
        while stream is None:
            try:
                stream = await self._driver.attach(self._instance_id, self._exec_id, stdin=self._stdin)
            except (NotFound, OSError) as error:
                # a monitor that has just been started learns its sessions in a moment
                over = self._exec_id is None and self._driver.has_exited(self._instance_id)
                if (isinstance(error, NotFound) and (over or not fresh)) or time.monotonic() > deadline:
                    break
                await asyncio.sleep(_SHORTEST)
        self._ended, self._fresh = ended, fresh
        self._stream.set_result(stream)

    def fail(self, error: InsulaError) -> None:
        """End the stream with an error, since the instance will not start."""
        if not self._stream.done():
            self._stream.set_exception(error)
            self._stream.exception()  # retrieved, so that asyncio logs nothing if the client never iterates

    async def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Send STDIN, STDIN_EOF or RESIZE. Waits until the instance is launched."""
        if stream := await asyncio.shield(self._stream):
            await stream.send(kind, payload)

    async def __aiter__(self) -> AsyncIterator[tuple[Kind, bytes]]:
        """Frames of STDOUT and STDERR, and at last EXIT. Unavailable if output was lost."""
        stream = await asyncio.shield(self._stream)
        ended = self._ended
        assert ended is not None
        delivered: Counter[Kind] = Counter()
        lost = self._fresh and stream is None
        if stream is not None and not self._replay:
            finishing = asyncio.ensure_future(_finish(stream, ended))
            try:
                async for kind, data in stream:
                    delivered[kind] += len(data)
                    yield kind, data
            finally:
                finishing.cancel()
            lost = not stream.complete
        if self._replay or lost:
            async for kind, data in self._rest(delivered, ended):
                yield kind, data
        last = exit_frame(await asyncio.shield(ended))
        if self._after:
            await self._after.wait()
        yield last

    async def _rest(self, delivered: Counter[Kind], ended: asyncio.Future[Exit]) -> AsyncIterator[tuple[Kind, bytes]]:
        """The output that follows what was delivered, from the log. `delivered` counts bytes by kind."""
        if self._log is None:
            raise Unavailable("the monitor of its output died, and some may be lost", "run it again")
        complete = asyncio.ensure_future(self._complete(ended))
        try:
            with self._log() as reader:
                async for records in follow(reader, complete.done):
                    for number, (kind, data) in enumerate(merge(records)):
                        if number % _TURN == 0:
                            await asyncio.sleep(0)
                        skipped = min(delivered[kind], len(data))
                        delivered[kind] -= skipped
                        if data[skipped:]:
                            yield kind, data[skipped:]
        finally:
            complete.cancel()

    async def _complete(self, ended: asyncio.Future[Exit]) -> None:
        await asyncio.wait([ended])
        await self._driver.flushed(self._instance_id, self._exec_id)

    def close(self) -> None:
        """Detach. The process goes on."""
        if not self._stream.done():
            self._stream.cancel()
        elif not self._stream.cancelled() and not self._stream.exception() and (stream := self._stream.result()):
            stream.close()


async def _finish(stream: Streams, ended: asyncio.Future[Exit]) -> None:
    await asyncio.wait([ended])
    await stream.finish()
