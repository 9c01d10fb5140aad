"""Tap devices: network devices whose other end is a file descriptor (Documentation/networking/tuntap.rst of Linux).

Frames that are written to the descriptor arrive at the device, and those that the device sends are read from it. The
device goes with its last descriptor. It may be moved to another network namespace; the descriptor stays with it.
"""

from __future__ import annotations

import fcntl
import os
import struct

from insula.kernel.netns import call_in_new

DEVICE = "/dev/net/tun"
_REQUEST = struct.Struct("16sH22x")  # struct ifreq (netdevice(7)) with ifr_flags
_TUNSETIFF, _TUNGETIFF, _TUNGETDEVNETNS = 0x400454CA, 0x800454D2, 0x54E3
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x2, 0x1000, 0x4000


def make() -> int:
    """Make a tap, down, in a network namespace of its own, and return its descriptor. Frames have the header of
    virtio-net, which leaves checksums and segmentation to the receiver. OSError."""
    return call_in_new(make_here)


def make_here() -> int:
    """Make such a tap in the network namespace of this thread. OSError."""
    fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, _REQUEST.pack(b"tap0", _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
    except BaseException:
        os.close(fd)
        raise
    return fd


def name(tap: int) -> str:
    """Return the name of a tap's device. OSError."""
    packed: bytes = fcntl.ioctl(tap, _TUNGETIFF, bytes(_REQUEST.size))
    return str(_REQUEST.unpack(packed)[0].rstrip(b"\0").decode())


def namespace(tap: int) -> int:
    """Return a descriptor of the network namespace that a tap's device is in. OSError."""
    return fcntl.ioctl(tap, _TUNGETDEVNETNS)
