"""Settings of terminals (termios(3), ioctl_tty(2)), without the module termios, which small processes do not load."""

from __future__ import annotations

import fcntl
import struct

_TCGETS, _TCSETS = 0x5401, 0x5402


def make_raw(terminal: int) -> None:
    """Have a terminal pass everything on: no lines, no echo, no signals. OSError."""
    mode = bytearray(fcntl.ioctl(terminal, _TCGETS, bytes(64)))
    struct.pack_into("4I", mode, 0, 0, 0, struct.unpack_from("I", mode, 8)[0], 0)
    fcntl.ioctl(terminal, _TCSETS, bytes(mode))
