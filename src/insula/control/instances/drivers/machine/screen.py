"""The screen of a machine of a disk image: a picture of it, and viewers. The other side is
`insula.machine.shim.disk_machine`."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Final

from insula.control.instances.drivers.machine.shim import ask
from insula.model.errors import Failed

_PICTURE: Final = 32 << 20
_PNG: Final = b"\x89PNG\r\n\x1a\n"
_PATIENCE: Final = 20.0  # seconds until the screen is shown


async def picture(netns: Callable[[], int]) -> bytes:
    """A picture of the screen (PNG) of a machine. `netns` opens the network namespace of its container. Failed,
    NotFound."""
    file = os.memfd_create("screen", os.MFD_CLOEXEC)
    try:
        writable = _written_only(file)
        try:
            await _show(netns, "screen", writable)
        finally:
            os.close(writable)
        data = os.pread(file, _PICTURE + 1, 0)
    finally:
        os.close(file)
    if not data.startswith(_PNG) or len(data) > _PICTURE:
        raise _no_screen("QEMU sends no picture")
    return data


async def view(netns: Callable[[], int]) -> socket.socket:
    """Our end of a connection of a viewer (RFB, RFC 6143), as above."""
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            await _show(netns, "vnc", theirs.fileno())
    except BaseException:
        ours.close()
        raise
    ours.setblocking(False)
    return ours


async def _show(netns: Callable[[], int], how: str, target: int) -> None:
    """Have the shim show the screen at a descriptor. Failed, NotFound."""
    try:
        async with asyncio.timeout(_PATIENCE):
            answer = await ask(netns(), {"ask": how}, [target])
    except TimeoutError:
        answer = None
    if answer is None or "error" in answer:
        raise _no_screen(str((answer or {}).get("error") or "QEMU does not answer")[:200])


def _no_screen(why: str) -> Failed:
    return Failed(f"the screen can't be shown: {why}", "try again; `insula logs` shows the serial console")


def _written_only(fd: int) -> int:
    """Another descriptor of an open file, for writing: QEMU takes none that can be read as well."""
    return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
