"""The standard streams of a new process: pipes, /dev/null, or a pseudoterminal of the container's own.

A pseudoterminal (pty(7)) has two sides. The program gets one as its controlling terminal, which makes signals of keys
such as Ctrl-C; the other goes to the monitor. Both come from the container's own devpts, so that it sees its
terminal by name. A process inside may have put other files at these names, so an opened file is checked first.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from insula.container import wire
from insula.kernel import mounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from insula.model.cpython import socket

_TCGETS, _TCSETS, _ONLCR = 0x5401, 0x5402, 4
_TIOCGPTN, _TIOCSPTLCK, _TIOCGPTPEER, _TIOCSCTTY, _TIOCSWINSZ = 0x80045430, 0x40045431, 0x5441, 0x540E, 0x5414
_NULL_DEVICE = os.makedev(1, 3)
_PTMX_DEVICE = os.makedev(5, 2)


def open_null() -> int:
    """Open /dev/null of the container. OSError if it is another file: an image may have any file there."""
    fd = os.open("/dev/null", os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not is_null_device(fd):
        os.close(fd)
        raise OSError(errno.ENODEV, "it is not the null device", "/dev/null")
    return fd


def is_null_device(fd: int) -> bool:
    """Whether the file behind `fd` is the null device."""
    status = os.fstat(fd)
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == _NULL_DEVICE


def connect_stdio(stdio: list[int]) -> None:
    """Make the descriptors the standard streams (dup2(2)); -1 becomes /dev/null."""
    null = open_null() if -1 in stdio else -1
    # first out of the way of each other: a source may itself be 0, 1 or 2
    sources = [fcntl.fcntl(null if fd < 0 else fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in stdio]
    for number, source in enumerate(sources):
        os.dup2(source, number, inheritable=True)
        os.close(source)


def open_console(process: dict[str, Any], sync: socket.socket) -> None:
    """Open a pseudoterminal (pty(7)) of the container's own devpts, send its master to the parent, and use its
    slave."""
    master, slave = open_terminal(process)
    number = struct.unpack("I", fcntl.ioctl(master, _TIOCGPTN, bytes(4)))[0]
    console = mounts.bind(f"/dev/pts/{number}")
    try:
        os.close(os.open("/dev/console", os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        target = os.open("/dev/console", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        mounts.attach(console, target)
        os.close(target)
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise
    finally:
        os.close(console)
    wire.send(sync, {"event": "terminal"}, [master])
    os.close(master)
    take_terminal(slave)


def open_terminal(process: dict[str, Any]) -> tuple[int, int]:
    """Open a new pseudoterminal: master and slave, which belongs to the program's user."""
    master = os.open("/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(master)
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != _PTMX_DEVICE:
        raise OSError(errno.ENODEV, "it is not a terminal multiplexer", "/dev/pts/ptmx")
    fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
    # by ioctl, not by name, so that no process in the container can replace the file
    slave = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    os.fchown(slave, (process.get("user") or {}).get("uid", 0), -1)
    size = process.get("consoleSize")
    if size:
        fcntl.ioctl(slave, _TIOCSWINSZ, struct.pack("4H", size["height"], size["width"], 0, 0))
    return master, slave


def plain_lines(terminal: int) -> None:
    """Have a terminal pass ``\\n`` on unchanged (without ONLCR, termios(3)): its output may go to a pipe."""
    mode = bytearray(fcntl.ioctl(terminal, _TCGETS, bytes(36)))
    flags = struct.unpack_from("I", mode, 4)[0]  # c_oflag; without the module termios, which a child can't import
    struct.pack_into("I", mode, 4, flags & ~_ONLCR)
    fcntl.ioctl(terminal, _TCSETS, bytes(mode))


def take_terminal(slave: int) -> None:
    """Make the slave the controlling terminal (TIOCSCTTY) and the standard streams."""
    fcntl.ioctl(slave, _TIOCSCTTY, 0)
    connect_stdio([slave, slave, slave])
    if slave > 2:
        os.close(slave)
