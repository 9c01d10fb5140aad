"""`AttachedProcess`: a process with its input and output, for `exec`, `attach` and `run_attached`."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from insula.model.stream import MAX_PAYLOAD, RESIZE, Decoder, Kind, encode
from insula.sdk._sync.calls import Caller, checked
from insula.sdk._sync.network import Background
from insula.sdk._sync.transport import Exchange
from insula.sdk.decoding import frames, of, parsed
from insula.sdk.messages import ConnectionLost, HTTPRequest
from insula.sdk.types import STREAMS, CompletedProcess, ProcessExit, ProcessOutput


class AttachedProcess:
    """A process in an instance. Iterate over its output; after that, `exit` tells how it has ended.

    The request is sent at the start of the `with` block, or else at the first use. At the end of the block the
    connection is closed; a process that still runs then runs on. Input may be written in one task, or thread, while
    another one reads the output: a process that waits for its output to be read may take no input.
    """

    def __init__(self, caller: Caller, request: HTTPRequest, opening: object = None) -> None:
        self._caller = caller
        self._request = request._replace(body=None).with_field("content-type", "application/vnd.insula.frames")
        self._opening = opening
        self._exchange: Exchange | None = None
        self._decoder = Decoder()
        self._frames: Iterator[tuple[Kind, bytes]] = iter(())  # those that have arrived
        self.name = ""
        """The name of the instance that `run_attached` has made."""
        self.exit: ProcessExit | None = None
        """How the process has ended; None until its output has ended."""

    def __enter__(self) -> AttachedProcess:
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Detach from the process."""
        if self._exchange is not None:
            self._exchange.close()

    # -- to the process ------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send data to the standard input. It is lost if the process has ended."""
        for start in range(0, len(data), MAX_PAYLOAD):
            self._send(Kind.STDIN, data[start : start + MAX_PAYLOAD])

    def end_input(self) -> None:
        """Close the standard input: the process reads its end."""
        self._send(Kind.STDIN_EOF)

    def resize(self, rows: int, columns: int) -> None:
        """Change the size of its terminal."""
        self._send(Kind.RESIZE, RESIZE.pack(rows, columns))

    def signal(self, number: int) -> None:
        """Send it a signal, as in `signal.SIGTERM`."""
        self._send(Kind.SIGNAL, bytes([number]))

    # -- from the process ----------------------------------------------------------------------------------------------

    def __iter__(self) -> AttachedProcess:
        return self

    def __next__(self) -> ProcessOutput:
        while self.exit is None:
            kind, payload = self._frame()
            if kind in STREAMS:
                return ProcessOutput(stream=STREAMS[kind], data=payload)
            if kind is Kind.EXIT:
                self.exit = of(ProcessExit)(parsed(payload))
        self.close()
        raise StopIteration

    def wait(self) -> ProcessExit:
        """Read what is left of the output, and return how the process has ended."""
        return (self._rest()).exit

    def communicate(self, data: bytes | None = None) -> CompletedProcess:
        """Send `data` as the whole input, read all output, and return it. The connection is closed after that.

        None sends nothing, and is for a process without an input.
        """

        def feed() -> None:
            self.write(data or b"")
            self.end_input()

        try:
            exchange = self._open()
            if data is None:
                return self._rest()
            with Background(feed):
                try:
                    return self._rest()
                finally:
                    exchange.close()  # it ends `feed` if the process has not taken its input
        finally:
            self.close()

    def _rest(self) -> CompletedProcess:
        output = {"stdout": bytearray(), "stderr": bytearray()}
        for piece in self:
            output[piece.stream] += piece.data
        ended = self.exit or ProcessExit(exit_status=None)
        return CompletedProcess(exit=ended, stdout=bytes(output["stdout"]), stderr=bytes(output["stderr"]))

    # -- frames --------------------------------------------------------------------------------------------------------

    def _open(self) -> Exchange:
        if self._exchange is None:
            exchange = self._caller.begin(self._request)
            self._exchange = exchange
            if self._opening is not None:
                exchange.send(encode(Kind.OPEN, msgspec.json.encode(self._opening)))
            self.name = ((checked(exchange)).head()).fields.get("x-insula-name", "")
        return self._exchange

    def _send(self, kind: Kind, payload: bytes = b"") -> None:
        (self._open()).send(encode(kind, payload))

    def _frame(self) -> tuple[Kind, bytes]:
        """Return the next frame. ConnectionLost if there is none."""
        exchange = self._open()
        while (frame := next(self._frames, None)) is None:
            if not (piece := exchange.receive()):
                raise ConnectionLost("insulad closed the connection; the process may run on", "attach again")
            self._frames = frames(self._decoder, piece)
        return frame
