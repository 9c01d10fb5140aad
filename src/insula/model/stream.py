"""The frames in which input and output of an instance travel, over HTTP bodies, unix sockets and in log files.

A frame is a 1-byte kind, a 4-byte big-endian length and that many bytes. A log file holds the same frames,
each with an 8-byte timestamp (nanoseconds since the epoch) at the head of its payload; see `insula.container.log`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum

HEADER = struct.Struct(">BI")
RESIZE = struct.Struct(">HH")
MAX_PAYLOAD = 1 << 20


class Kind(IntEnum):
    """What a frame carries. Towards the instance: OPEN, STDIN, STDIN_EOF, RESIZE, SIGNAL; from it: STDOUT, STDERR,
    EXIT, ERROR. OPEN and SIGNAL are for the API's side alone: the runtime never sees them."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2
    STDIN_EOF = 3
    RESIZE = 4  # payload: rows and columns, RESIZE
    EXIT = 5  # payload: JSON {"exit_status": int, "signal": int | null, "oom": bool}
    ERROR = 6  # payload: JSON as of InsulaError.to_dict
    IDLE = 7  # keeps a connection alive; payload empty
    OPEN = 8  # payload: JSON, what to execute; the first frame of an exec
    SIGNAL = 9  # payload: one byte, a signal for the process at the other end (signal(7))


def encode(kind: Kind, payload: bytes = b"") -> bytes:
    """One frame; `payload` is at most MAX_PAYLOAD bytes."""
    return HEADER.pack(kind, len(payload)) + payload


class Decoder:
    """Cuts a byte stream into frames: feed it chunks as they arrive, iterate what is complete.

    Raises ValueError on an unknown kind or an oversized frame: the stream can't be trusted from there on.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> Iterator[tuple[Kind, bytes]]:
        self._buffer += chunk
        while len(self._buffer) >= HEADER.size:
            kind, length = HEADER.unpack_from(self._buffer)
            if length > MAX_PAYLOAD:
                raise ValueError(f"frame of {length} bytes exceeds {MAX_PAYLOAD}")
            end = HEADER.size + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[HEADER.size : end])
            del self._buffer[:end]
            yield Kind(kind), payload
