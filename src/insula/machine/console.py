"""Frames over a console: what a serial line is to a computer, a console of Xen is to a guest.

A console is no clean stream. The guest's kernel may write to it too, and takes ^O from its input for itself (sysrq). So
each frame is sent as on a serial line by PPP: it begins and ends with a flag, bytes that mean something to the line are
escaped, and a checksum is behind it (RFC 1662, "PPP in HDLC-like Framing", 4 and C.3). What has no right checksum
is not ours, and is dropped. Each frame has a number, so that a lost one is noticed.
"""

from __future__ import annotations

import binascii
import struct

from insula.machine import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_FLAG, _ESCAPE, _XOR = 0x7E, 0x7D, 0x20
_ESCAPED = (0x7D, 0x7E, 0x0F, 0x11, 0x13)  # the escape is the first; ^O, XON and XOFF
_PAIRS = [(bytes([each]), bytes([_ESCAPE, each ^ _XOR])) for each in _ESCAPED]
_NUMBER, _CHECKSUM = struct.Struct(">I"), struct.Struct("<I")
_LEAST = _NUMBER.size + protocol.HEADER.size + _CHECKSUM.size
_MOST = 2 * (_LEAST + protocol.MAX_PAYLOAD)
_NUMBERS = 1 << 32


class ConsoleCoding:
    """One end of a console: encodes frames, and finds those of the other end; as `protocol.Coding`."""

    def __init__(self) -> None:
        self._sent = self._received = 0
        self._buffer = bytearray()

    def encode(self, session: int, kind: int, payload: bytes = b"") -> bytes:
        """Encode a frame; `payload` has at most MAX_PAYLOAD bytes. Frames are to be sent in this order, and all."""
        body = _NUMBER.pack(self._sent) + protocol.encode(session, kind, payload)
        self._sent = (self._sent + 1) % _NUMBERS
        body += _CHECKSUM.pack(binascii.crc32(body))
        for plain, escaped in _PAIRS:
            body = body.replace(plain, escaped)
        return b"~" + body + b"~"

    def feed(self, chunk: bytes) -> Iterator[tuple[int, int, bytes]]:
        """Add bytes, and iterate over the frames that are complete: session, kind and payload. ValueError if a frame
        was lost: the rest of the stream is unusable."""
        self._buffer += chunk
        if _FLAG not in chunk:
            if len(self._buffer) > _MOST:
                self._buffer.clear()  # no frame is that long
            return
        *pieces, rest = bytes(self._buffer).split(b"~")
        self._buffer = bytearray(rest[-_MOST:])
        for piece in pieces:
            if (body := _checked(piece)) is None:
                continue
            if _NUMBER.unpack_from(body)[0] != self._received:
                raise ValueError("a frame was lost on the console")
            self._received = (self._received + 1) % _NUMBERS
            yield from protocol.FrameDecoder().feed(body[_NUMBER.size :])


def _checked(piece: bytes) -> bytes | None:
    """What was sent, without its checksum; None if it is no frame."""
    if len(piece) < _LEAST or len(piece) > _MOST:
        return None
    for plain, escaped in reversed(_PAIRS):
        piece = piece.replace(escaped, plain)
    if len(piece) < _LEAST or _CHECKSUM.unpack(piece[-_CHECKSUM.size :])[0] != binascii.crc32(piece[: -_CHECKSUM.size]):
        return None
    return piece[: -_CHECKSUM.size]
