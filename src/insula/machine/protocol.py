"""Frames between a machine and its host, over one virtio-serial port (Virtual I/O Device specification, 5.3), or over
the console of a guest of Xen (`insula.machine.console`).

A port is a stream of bytes each way, so many conversations share it: each frame has the number of its *session*,
chosen by the host, a kind and a payload. A session begins with a REQUEST of the host, JSON with a `verb`, and the agent
answers REPLY or ERROR. A request to run a program leaves the session open for its streams, until EXIT.

A stream must not fill the channel while its reader is slow. So each side sends at most as many bytes of a session's
streams as the other has granted it: `WINDOW` at first, and more by frames of kind GRANT, as in SSH (RFC 4254, 5.2).

Both sides use this module; the agent has it in its initramfs.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Protocol

    class Coding(Protocol):
        """How frames are written to a stream, and found in it; see `encode` and `FrameDecoder.feed`."""

        def encode(self, session: int, kind: int, payload: bytes = b"") -> bytes: ...
        def feed(self, chunk: bytes) -> Iterator[tuple[int, int, bytes]]: ...


VERSION = 1
PORT = "insula.agent"
"""The name of the port, as in /sys/class/virtio-ports/*/name of the guest."""
ETC = "/run/etc"
"""The directory in the guest of hostname, hosts and resolv.conf, which the host makes for the program."""
DISKS = "/disks"
"""The directory in the guest in which further disks are mounted, by their names."""
HEADER = struct.Struct(">IBI")
NUMBER = struct.Struct(">I")
SIZE = struct.Struct(">HH")
"""Rows and columns of a terminal."""
MAX_PAYLOAD = 1 << 20
CHUNK = 32 << 10
"""The most bytes of a stream in one frame: a large one would delay those of others."""
WINDOW = 256 << 10

NOBODY = 0
"""The session of frames that are about none, which the host does not look at but for HELLO."""

REQUEST = 0  # JSON with `verb`
REPLY = 1  # JSON
ERROR = 2  # JSON: step, object, errno, error, path (`StepError`)
STDIN = 3
STDIN_EOF = 4
STDOUT = 5
STDERR = 6
GRANT = 7  # NUMBER: bytes that may be sent besides
SIGNAL = 8  # one byte; a second one if it is for the process group too
EXIT = 9  # JSON: status, as of os.waitstatus_to_exitcode
HELLO = 10  # JSON: version; the first frame of the agent
RESIZE = 11  # SIZE: of the program's terminal
_KINDS = frozenset(range(12))


def encode(session: int, kind: int, payload: bytes = b"") -> bytes:
    """Encode a frame; `payload` has at most MAX_PAYLOAD bytes."""
    return HEADER.pack(session, kind, len(payload)) + payload


class PlainCoding:
    """Frames as they are, for a stream that has nothing else."""

    def __init__(self) -> None:
        self._decoder = FrameDecoder()
        self.feed = self._decoder.feed

    encode = staticmethod(encode)


class FrameDecoder:
    """Splits a stream of bytes into frames. ValueError for what is no frame: the rest of the stream is unusable."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> Iterator[tuple[int, int, bytes]]:
        """Add bytes, and iterate over the frames that are complete: session, kind and payload."""
        self._buffer += chunk
        while len(self._buffer) >= HEADER.size:
            session, kind, length = HEADER.unpack_from(self._buffer)
            if kind not in _KINDS or length > MAX_PAYLOAD:
                raise ValueError(f"it is no frame: kind {kind} with {length} bytes")
            end = HEADER.size + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[HEADER.size : end])
            del self._buffer[:end]
            yield session, kind, payload
