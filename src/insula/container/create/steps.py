"""What every child does alike: run named steps, say which one failed, keep nothing of its parent's.

The modules in C beneath `socket` and `signal` are used directly: those two cost 13 ms to import.
"""

from __future__ import annotations

import os
import sys

from insula.container import wire
from insula.kernel import linux
from insula.model.cpython import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from insula.model.cpython import socket

INTERRUPTED = 254
"""The exit status of a child that lost its parent before it was told to start."""


class StepError(Exception):
    """A step failed: what it was, and the error."""

    def __init__(self, step: str, error: OSError) -> None:
        self.message = {
            "step": step,
            "errno": error.errno or 0,
            "error": error.strerror or str(error),
            "path": error.filename,
        }
        super().__init__(self.message)

    def __str__(self) -> str:
        about = f"{self.message['path']}: " if self.message["path"] else ""
        return f"{self.message['step']}: {about}{self.message['error']}"


def send_error(sync: socket.socket, error: StepError) -> None:
    """Tell the parent why it failed."""
    send(sync, {"event": "error", **error.message})


def send(sync: socket.socket, message: wire.Message, descriptors: list[int] | None = None) -> None:
    """Send the parent a message; without a parent there is nothing to go on for."""
    try:
        wire.send(sync, message, descriptors)
    except OSError:
        os._exit(INTERRUPTED)


def recv(sync: socket.socket) -> wire.Message:
    """The parent's next word; without a parent there is nothing to go on for."""
    received = wire.receive(sync)
    if received is None:
        os._exit(INTERRUPTED)
    return received[0]


def forbid_imports() -> None:
    """Make every import of what isn't loaded fail: among a container's files, ours would be looked for in its own.

    An image that has a file where Python expects one of ours would otherwise run it with all rights that are left.
    """
    sys.meta_path.clear()


def close_others(keep: list[int]) -> None:
    """Close what the parent has open for others; without this its end of our own channel would live on in us."""
    first = 3  # the standard streams are replaced later
    for fd in sorted({fd for fd in keep if fd > 2}):
        if fd > first:
            linux.close_range(first, fd - 1)
        first = fd + 1
    linux.close_range(first, 0x7FFFFFFF)


def step(name: str, action: Callable[[], object]) -> None:
    """Run one step, naming it if it fails."""
    try:
        action()
    except OSError as error:
        raise StepError(name, error) from None


def reset_signals() -> None:
    """Undo what Python and whoever started us set: a program expects the default actions and nothing blocked."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if signal.getsignal(number) != signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
