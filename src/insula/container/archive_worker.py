"""Start and use a process that copies files into or out of one container (`insula.container.archive`).

It reads an archive from its standard input or writes one to its standard output, and an error as JSON to its standard
error. When its parent ends, its pipes are closed, and it ends too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import insula
from insula.model.errors import Failed, from_dict

_BUFFER = 1 << 18
_PATIENCE = 5.0  # seconds to remove what was begun


class Worker:
    """A running process: `read` its archive or `write` one to it, then `finish`, which raises its error if it had
    one."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        assert child.stdin and child.stdout and child.stderr
        self._child, self._stdin, self._stdout = child, child.stdin, child.stdout
        self._said = asyncio.ensure_future(child.stderr.read())

    async def read(self) -> bytes:
        """The next piece of the archive; empty at its end."""
        return await self._stdout.read(_BUFFER)

    async def write(self, data: bytes) -> None:
        """Send a piece of the archive. BrokenPipeError or ConnectionResetError once the worker has failed."""
        self._stdin.write(data)
        await self._stdin.drain()

    async def finish(self) -> None:
        """Wait for its end, at the end of the archive."""
        self._stdin.close()
        said, status = await self._said, await self._child.wait()
        if status == 0:
            return
        try:
            error = json.loads(said)
        except ValueError:
            last = said.decode(errors="replace").strip()[-200:]
            raise Failed(f"the process that copies ended with status {status}: {last!r}", "see insulad's log") from None
        raise from_dict(error)

    async def end(self, patience: float) -> None:
        """End it unless it has ended: close its input, and send SIGKILL after `patience` seconds."""
        self._stdin.close()
        if self._child.returncode is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._child.wait()
        if self._child.returncode is None:
            self._child.kill()
        while await self._stdout.read(_BUFFER):  # a pipe that is not read to its end stays open
            pass
        await self._said
        await self._child.wait()


@asynccontextmanager
async def started(
    verb: str, pid: int, start_time: int, path: str = "/", copy: str | None = None
) -> AsyncIterator[Worker]:
    """Start one for the container whose PID 1 is (pid, start time). `verb` is "write", "read" or "export"."""
    library = str(Path(insula.__file__).parent.parent)
    code = f"import sys; sys.path.insert(0, {library!r}); from insula.container.archive import main; main()"
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-ISE", "-c", code, json.dumps([verb, pid, start_time, path, copy])),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=_BUFFER,
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
    )
    worker = Worker(child)
    try:
        yield worker
    finally:  # one that writes into the instance takes back what it has begun; one that only reads has nothing to do
        await asyncio.shield(asyncio.ensure_future(worker.end(_PATIENCE if verb == "read" else 0.0)))
