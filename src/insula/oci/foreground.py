"""Waits for a process of a container in the foreground, for `run` and `exec`: forwards its signals and its terminal.

Signals to this command, such as Ctrl-C in a shell or SIGTERM of a supervisor, are sent on to the process. If the
container has a terminal of its own, keys such as Ctrl-C become signals in it. Then the caller's terminal, if standard
input is one, is made raw (termios(3)), and all bytes are copied both ways.
"""

from __future__ import annotations

import os
import select

from insula.model.cpython import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_CHUNK = 16 << 10
_OURS = {signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH, signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE}


def hold_signals() -> None:
    """Block the signals that `wait` forwards. Call it before the process exists that they could be meant for."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _OURS)


def wait(pid: int, master: int = -1) -> int:
    """Wait for our child `pid`, forwarding signals; returns its exit status, 128 + n if signal n killed it.

    `master` is the master of its terminal, which is copied to and from our standard streams; -1 without a terminal.
    """
    for number in signal.valid_signals() - _OURS:
        signal.signal(number, _forward(pid))
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if master >= 0:
        _relay(master)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _forward(pid: int) -> Callable[[int, FrameType | None], None]:
    def forward(number: int, frame: FrameType | None) -> None:
        try:
            os.kill(pid, number)  # our child, and not yet waited for
        except ProcessLookupError:
            return

    return forward


def _relay(master: int) -> None:
    """Copy between our standard streams and the terminal, until no process has it open."""
    import termios
    import tty

    before = None
    if os.isatty(0):
        before = termios.tcgetattr(0)
        tty.setraw(0)
        mode = termios.tcgetattr(0)
        mode[1] |= termios.OPOST  # a line's end is made here, where the terminal is: see `stdio.plain_lines`
        termios.tcsetattr(0, termios.TCSADRAIN, mode)
        signal.signal(signal.SIGWINCH, lambda *_: _resize(master))
        _resize(master)
    try:
        _copy(master)
    finally:
        if before is not None:
            termios.tcsetattr(0, termios.TCSADRAIN, before)


def _resize(master: int) -> None:
    import termios

    termios.tcsetwinsize(master, termios.tcgetwinsize(0))


def _copy(master: int) -> None:
    os.set_blocking(master, True)
    poll = select.poll()
    poll.register(master, select.POLLIN)
    poll.register(0, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            try:
                data = os.read(fd, _CHUNK)
            except OSError:  # EIO: the last process that had it open is gone
                data = b""
            if data:
                _write_all(1 if fd == master else master, data)
            elif fd == master:
                return
            else:
                poll.unregister(0)
                _write_all(master, b"\x04")  # end of file, as a terminal has it (VEOF)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except OSError:
            return
