"""What every child of the spawner does alike: run named steps, say which one failed, keep nothing of the spawner's."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable

from insula.container import wire
from insula.container.bundle import INTERRUPTED
from insula.kernel import linux


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


def report(sync: socket.socket, error: StepError) -> None:
    """Tell the parent why it failed."""
    tell(sync, {"event": "error", **error.message})


def tell(sync: socket.socket, message: wire.Message) -> None:
    """Send the parent a message; without a parent there is nothing to go on for."""
    try:
        wire.send(sync, message)
    except OSError:
        os._exit(INTERRUPTED)


def close_others(keep: list[int]) -> None:
    """Close what the spawner has open for others; without this its end of our own channel would live on in us."""
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
