"""The identity of a machine: random numbers, clock and names.

Machines are made as copies of a running one, which takes a tenth of the time of a boot. A copy has all of the
original's memory: two copies draw the same random numbers, believe in the same moment, and have the same name. So the
host gives each one an identity of its own before any program of the user runs, and again whenever it was stopped.

- The kernel's generator (random(4)) mixes in 64 bytes from the host, which count as entropy (RNDADDENTROPY), and draws
  a new key from them at once (RNDRESEEDCRNG). Linux 6.1 has no driver of the virtual device that announces copies.
- The clock is set to the host's (clock_settime(2)).
- The generation is a random number from the host. The agent keeps it, and returns it: a machine that answers with
  another one has not done what it was told.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time

from insula.kernel import syscalls
from insula.model.cpython import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207
_SEED = 64


def assume(identity: dict[str, Any]) -> None:
    """Take on an identity: `seed` (hexadecimal, 64 bytes), `time` (nanoseconds since the epoch), and `hostname`."""
    reseed(bytes.fromhex(identity["seed"]))
    time.clock_settime_ns(time.CLOCK_REALTIME, identity["time"])
    socket.sethostname(identity["hostname"])


def rename(pid: int, hostname: str) -> None:
    """Set the host name that a program sees, which has a namespace of its own for it (uts_namespaces(7))."""
    own, its = (os.open(f"/proc/{each}/ns/uts", os.O_RDONLY | os.O_CLOEXEC) for each in ("self", pid))
    try:
        syscalls.setns(its, syscalls.CLONE_NEWUTS)
        try:
            socket.sethostname(hostname)
        finally:
            syscalls.setns(own, syscalls.CLONE_NEWUTS)
    finally:
        os.close(own)
        os.close(its)


def reseed(seed: bytes) -> None:
    """Mix bytes into the kernel's random numbers, as entropy, and use them from now on. ValueError if too few."""
    if len(seed) < _SEED:
        raise ValueError(f"a seed has at least {_SEED} bytes")
    fd = os.open("/dev/urandom", os.O_RDWR | os.O_CLOEXEC)
    try:
        request = bytearray(struct.pack("ii", 8 * len(seed), len(seed)) + seed)
        fcntl.ioctl(fd, _RNDADDENTROPY, request)
        fcntl.ioctl(fd, _RNDRESEEDCRNG)
    finally:
        os.close(fd)
