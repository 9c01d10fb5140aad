"""Frames for input and output of an instance, in HTTP bodies, on unix sockets and in log files.

A frame is a 1-byte kind, a 4-byte big-endian length and a payload of that many bytes. A log file has the same frames,
each with an 8-byte timestamp (nanoseconds since the epoch) at the start of its payload; see `insula.container.log`.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import ClassVar

HEADER = struct.Struct(">BI")
RESIZE = struct.Struct(">HH")
MAX_PAYLOAD = 1 << 20


class Kind(int):
    """The kind of a frame. Sent to the instance: OPEN, STDIN, STDIN_EOF, RESIZE, SIGNAL; sent from it: STDOUT, STDERR,
    EXIT, ERROR. OPEN and SIGNAL are used by the API only, and not passed to the runtime.

    An enum.IntEnum would do, but takes 5 ms to import. `Kind(number)` is the member; ValueError if there is none.
    """

    name: str
    STDIN: ClassVar[Kind]
    STDOUT: ClassVar[Kind]
    STDERR: ClassVar[Kind]
    STDIN_EOF: ClassVar[Kind]
    RESIZE: ClassVar[Kind]  # payload: rows and columns, RESIZE
    EXIT: ClassVar[Kind]  # payload: JSON {"exit_status": int, "signal": int | null, "oom": bool}
    ERROR: ClassVar[Kind]  # payload: JSON as of InsulaError.to_dict
    IDLE: ClassVar[Kind]  # keeps a connection alive; payload empty
    OPEN: ClassVar[Kind]  # payload: JSON, what to execute; the first frame of an exec
    SIGNAL: ClassVar[Kind]  # payload: one byte, a signal for the process at the other end (signal(7))
    MESSAGE: ClassVar[Kind]  # payload: JSON, from one host to another; so are those below
    DISK: ClassVar[Kind]  # payload: bytes of the disk of a machine that moves (NBD)
    MEMORY: ClassVar[Kind]  # payload: bytes of its memory (QEMU's migration stream)
    FURTHER: ClassVar[Kind]  # payload: a byte, which of its further disks, by their names in order; bytes of that (NBD)

    def __new__(cls, number: int) -> Kind:
        member = _KINDS.get(number)
        if member is None:
            raise ValueError(f"{number} is not a kind of frame")
        return member

    def __repr__(self) -> str:
        return f"Kind.{self.name}"


_KINDS: dict[int, Kind] = {}
_NAMES = ("STDIN", "STDOUT", "STDERR", "STDIN_EOF", "RESIZE", "EXIT", "ERROR", "IDLE", "OPEN", "SIGNAL")
for _name in (*_NAMES, "MESSAGE", "DISK", "MEMORY", "FURTHER"):
    _kind = _KINDS[len(_KINDS)] = int.__new__(Kind, len(_KINDS))
    _kind.name = _name
    setattr(Kind, _name, _kind)


def encode(kind: Kind, payload: bytes = b"") -> bytes:
    """Encode a frame; `payload` has at most MAX_PAYLOAD bytes."""
    return HEADER.pack(kind, len(payload)) + payload


class Decoder:
    """Split a byte stream into frames: feed chunks as they arrive, and iterate over the complete frames.

    ValueError for an unknown kind or an oversized frame; the rest of the stream is unusable then.
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
