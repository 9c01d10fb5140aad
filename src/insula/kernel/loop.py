"""Loop devices: block devices whose content is a file (loop(4))."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

# linux/loop.h
_LOOP_SET_CAPACITY: Final = 0x4C07
_LOOP_CONFIGURE: Final = 0x4C0A
_LOOP_CTL_GET_FREE: Final = 0x4C82
_LO_FLAGS_AUTOCLEAR: Final = 4
_LO_FLAGS_DIRECT_IO: Final = 16
_CONFIG: Final = struct.Struct("II 5Q 4I 64s 64s 32s 2Q 8Q")  # struct loop_config with its loop_info64
_ATTEMPTS = 64


def attach(file: int) -> tuple[str, int]:
    """Attach an open file to a free loop device, which is detached when the last user closes it: (path, descriptor).

    Keep the descriptor open until the device is mounted. The device reads and writes the file directly (O_DIRECT) if
    the file system can, so that nothing is cached twice. OSError: ENOENT without the module loop.
    """
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_ATTEMPTS):
            path = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                _configure(device, file)
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:  # else another process was faster
                    raise
                continue
            return path, device
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "no loop device is free")


def _configure(device: int, file: int) -> None:
    """LOOP_CONFIGURE; buffered where the file system can't read and write directly."""
    for flags in (_LO_FLAGS_AUTOCLEAR | _LO_FLAGS_DIRECT_IO, _LO_FLAGS_AUTOCLEAR):
        info = (0, 0, 0, 0, 0, 0, 0, 0, flags, b"", b"", b"", 0, 0)
        try:
            fcntl.ioctl(device, _LOOP_CONFIGURE, _CONFIG.pack(file, 0, *info, *[0] * 8))
            return
        except OSError as error:
            if error.errno != errno.EINVAL or not flags & _LO_FLAGS_DIRECT_IO:
                raise


def resize(device: int) -> None:
    """LOOP_SET_CAPACITY: take over the present size of the file."""
    fcntl.ioctl(device, _LOOP_SET_CAPACITY)
