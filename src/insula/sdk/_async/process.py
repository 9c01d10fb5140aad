"""`AsyncAttachedProcess`: a process with its input and output, for `exec`, `attach` and `run_attached`."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from insula.model.stream import MAX_PAYLOAD, RESIZE, Decoder, Kind, encode
from insula.sdk._async.calls import AsyncCaller, checked
from insula.sdk._async.network import AsyncBackground
from insula.sdk._async.transport import AsyncExchange
from insula.sdk.decoding import frames, of, parsed
from insula.sdk.messages import ConnectionLost, HTTPRequest
from insula.sdk.types import STREAMS, CompletedProcess, ProcessExit, ProcessOutput


class AsyncAttachedProcess:
    """A process in an instance. Iterate over its output; after that, `exit` tells how it has ended.

    The request is sent at the start of the `with` block, or else at the first use. At the end of the block the
    connection is closed; a process that still runs then runs on. Input may be written in one task, or thread, while
    another one reads the output: a process that waits for its output to be read may take no input.
    """

    def __init__(self, caller: AsyncCaller, request: HTTPRequest, opening: object = None) -> None:
        self._caller = caller
        self._request = request._replace(body=None).with_field("content-type", "application/vnd.insula.frames")
        self._opening = opening
        self._exchange: AsyncExchange | None = None
        self._decoder = Decoder()
        self._frames: Iterator[tuple[Kind, bytes]] = iter(())  # those that have arrived
        self.name = ""
        """The name of the instance that `run_attached` has made."""
        self.exit: ProcessExit | None = None
        """How the process has ended; None until its output has ended."""

    async def __aenter__(self) -> AsyncAttachedProcess:
        await self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Detach from the process."""
        if self._exchange is not None:
            await self._exchange.aclose()

    # -- to the process ------------------------------------------------------------------------------------------------

    async def write(self, data: bytes) -> None:
        """Send data to the standard input. It is lost if the process has ended."""
        for start in range(0, len(data), MAX_PAYLOAD):
            await self._send(Kind.STDIN, data[start : start + MAX_PAYLOAD])

    async def end_input(self) -> None:
        """Close the standard input: the process reads its end."""
        await self._send(Kind.STDIN_EOF)

    async def resize(self, rows: int, columns: int) -> None:
        """Change the size of its terminal."""
        await self._send(Kind.RESIZE, RESIZE.pack(rows, columns))

    async def signal(self, number: int) -> None:
        """Send it a signal, as in `signal.SIGTERM`."""
        await self._send(Kind.SIGNAL, bytes([number]))

    # -- from the process ----------------------------------------------------------------------------------------------

    def __aiter__(self) -> AsyncAttachedProcess:
        return self

    async def __anext__(self) -> ProcessOutput:
        while self.exit is None:
            kind, payload = await self._frame()
            if kind in STREAMS:
                return ProcessOutput(stream=STREAMS[kind], data=payload)
            if kind is Kind.EXIT:
                self.exit = of(ProcessExit)(parsed(payload))
        await self.aclose()
        raise StopAsyncIteration

    async def wait(self) -> ProcessExit:
        """Read what is left of the output, and return how the process has ended."""
        return (await self._rest()).exit

    async def communicate(self, data: bytes | None = None) -> CompletedProcess:
        """Send `data` as the whole input, read all output, and return it. The connection is closed after that.

        None sends nothing, and is for a process without an input.
        """

        async def feed() -> None:
            await self.write(data or b"")
            await self.end_input()

        try:
            exchange = await self._open()
            if data is None:
                return await self._rest()
            async with AsyncBackground(feed):
                try:
                    return await self._rest()
                finally:
                    await exchange.aclose()  # it ends `feed` if the process has not taken its input
        finally:
            await self.aclose()

    async def _rest(self) -> CompletedProcess:
        output = {"stdout": bytearray(), "stderr": bytearray()}
        async for piece in self:
            output[piece.stream] += piece.data
        ended = self.exit or ProcessExit(exit_status=None)
        return CompletedProcess(exit=ended, stdout=bytes(output["stdout"]), stderr=bytes(output["stderr"]))

    # -- frames --------------------------------------------------------------------------------------------------------

    async def _open(self) -> AsyncExchange:
        if self._exchange is None:
            exchange = await self._caller.begin(self._request)
            self._exchange = exchange
            if self._opening is not None:
                await exchange.send(encode(Kind.OPEN, msgspec.json.encode(self._opening)))
            self.name = (await (await checked(exchange)).head()).fields.get("x-insula-name", "")
        return self._exchange

    async def _send(self, kind: Kind, payload: bytes = b"") -> None:
        await (await self._open()).send(encode(kind, payload))

    async def _frame(self) -> tuple[Kind, bytes]:
        """Return the next frame. ConnectionLost if there is none."""
        exchange = await self._open()
        while (frame := next(self._frames, None)) is None:
            if not (piece := await exchange.receive()):
                raise ConnectionLost("insulad closed the connection; the process may run on", "attach again")
            self._frames = frames(self._decoder, piece)
        return frame
