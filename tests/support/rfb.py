"""A VNC viewer for tests (the Remote Framebuffer protocol, RFC 6143): it reads the picture, and presses keys."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

VERSION = b"RFB 003.008\n"
_FORMAT = struct.pack(">BBBBHHHBBB3x", 32, 24, 0, 1, 255, 255, 255, 16, 8, 0)
_RAW, _SIZE = 0, -223  # the pseudo-encoding of a screen that changes its size


class RfbViewer:
    """A viewer that is connected by a unix socket or a TCP port. OSError if the server closes the connection."""

    def __init__(self, address: Path | tuple[str, int], patience: float = 60.0) -> None:
        family = socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET
        self.socket = socket.socket(family)
        self.socket.settimeout(patience)
        self.socket.connect(str(address) if isinstance(address, Path) else address)
        self.version = self._read(12)
        self.socket.sendall(VERSION)
        self.security = [*self._read(self._read(1)[0])]
        self.socket.sendall(b"\1")  # none: what is before it has asked who we are
        assert self._read(4) == bytes(4), "the server refuses"
        self.socket.sendall(b"\1")
        self.width, self.height = struct.unpack(">HH", self._read(4))
        self._read(16)
        self.name = self._read(struct.unpack(">I", self._read(4))[0]).decode()
        self.socket.sendall(struct.pack(">B3x", 0) + _FORMAT)
        self.socket.sendall(struct.pack(">BxHii", 2, 2, _RAW, _SIZE))

    def picture(self) -> bytes:
        """The whole screen, four bytes a pixel."""
        self.socket.sendall(struct.pack(">BBHHHH", 3, 0, 0, 0, self.width, self.height))
        while True:
            kind = self._read(1)[0]
            if kind == 0:
                if found := self._rectangles():
                    return found
                self.socket.sendall(struct.pack(">BBHHHH", 3, 0, 0, 0, self.width, self.height))
            elif kind == 3:  # the clipboard
                self._read(struct.unpack(">3xI", self._read(7))[0])
            else:
                assert kind == 2, f"a message of type {kind}"

    def _rectangles(self) -> bytes:
        """The picture of an update; empty if the screen has changed its size."""
        rows = [bytearray(self.width * 4) for _ in range(self.height)]
        sized = False
        for _ in range(struct.unpack(">xH", self._read(3))[0]):
            x, y, width, height, encoding = struct.unpack(">HHHHi", self._read(12))
            if encoding == _SIZE:
                self.width, self.height, sized = width, height, True
                continue
            assert encoding == _RAW
            for row in range(height):
                data = self._read(width * 4)
                if not sized:
                    rows[y + row][x * 4 : (x + width) * 4] = data
        return b"" if sized else b"".join(rows)

    def key(self, symbol: int) -> None:
        """Press and release a key, by its keysym (X11), which for letters and digits is their ASCII."""
        for down in (1, 0):
            self.socket.sendall(struct.pack(">BBxxI", 4, down, symbol))

    def point(self, x: int, y: int, buttons: int = 0) -> None:
        self.socket.sendall(struct.pack(">BBHH", 5, buttons, x, y))

    def closed(self) -> bool:
        """Wait for the server to close the connection; whatever else comes is dropped."""
        try:
            while self.socket.recv(1 << 16):
                pass
        except OSError:
            return False
        return True

    def close(self) -> None:
        self.socket.close()

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.socket.recv(min(count - len(data), 1 << 16))
            if not piece:
                raise ConnectionResetError("the server has closed the connection")
            data += piece
        return data
