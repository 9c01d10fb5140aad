"""Connect our input and output to those of a process: raw terminal, window size, signals, detach keys.

With a terminal on both sides (`-it`) ours is set to raw mode (termios(3)): every key, Ctrl-C too, is passed on as a
byte, and the terminal *inside* the instance converts it to a signal. Without one, received signals are forwarded. One
poll(2) loop does everything; signals wake it through a pipe (signal.set_wakeup_fd).
"""

from __future__ import annotations

import os
import select

from insula.cli.output import warn
from insula.client.http import CHUNK
from insula.model.cpython import loads, signal
from insula.model.errors import Invalid, from_dict
from insula.model.stream import RESIZE, Kind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from insula.client.attachment import Attachment

STDIN, STDOUT, STDERR = 0, 1, 2
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
DETACH_KEYS = b"\x10\x11"  # ctrl-p,ctrl-q
ENOUGH = 3
"""The number of Ctrl-C after which we stop waiting for a process that ignores it."""


def detach_keys(text: str) -> bytes:
    """Parse a key sequence such as ``ctrl-p,ctrl-q`` or ``ctrl-x,q`` to bytes; "" for none. Invalid."""
    result = bytearray()
    for key in text.split(",") if text else []:
        if len(key) == 1 and key.isascii() and key.isprintable():
            result += key.encode()
        elif len(key) == 6 and key.startswith("ctrl-") and "@" <= key[5].upper() <= "_":
            result.append(ord(key[5].upper()) & 0x1F)
        else:
            raise Invalid(f"{key!r} is not a key", "write keys as a or ctrl-a, separated by commas")
    return bytes(result)


class DetachFilter:
    """A filter that finds the detach sequence in typed bytes; it holds back bytes that may be its start."""

    def __init__(self, keys: bytes) -> None:
        self.keys = keys
        self.detached = False
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Return the bytes of `data`, and of those held back, that are passed to the instance."""
        if not self.keys:
            return data
        data, self._held = self._held + data, b""
        at = data.find(self.keys)
        if at >= 0:
            self.detached = True
            return data[:at]
        for length in range(min(len(self.keys) - 1, len(data)), 0, -1):
            if data.endswith(self.keys[:length]):
                self._held = data[-length:]
                return data[:-length]
        return data


def terminal_size() -> tuple[int, int] | None:
    """Return rows and columns of our terminal, that of the output or else of the input; None without a terminal."""
    for fd in (STDOUT, STDIN):
        try:
            size = os.get_terminal_size(fd)
        except OSError:
            continue
        return size.lines, size.columns
    return None


def require_terminal() -> None:
    """Check that our input is a terminal, for `-it`. Invalid."""
    if not os.isatty(STDIN):
        raise Invalid("the input is not a terminal", "leave out -t, or run this in a terminal")


class RawMode:
    """A context manager that sets the terminal at `fd` to raw mode, and restores its settings at the end.

    Like `SignalPipe` it does without contextlib, whose import takes 3 ms.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> None:
        import termios
        import tty

        self.before = termios.tcgetattr(self.fd)
        tty.setraw(self.fd, termios.TCSADRAIN)

    def __exit__(self, *_: object) -> None:
        import termios

        try:
            termios.tcsetattr(self.fd, termios.TCSADRAIN, self.before)
        except termios.error:  # the terminal may be gone
            return


class SignalPipe:
    """A context manager with a descriptor from which arriving `signals` are read, a byte with the number of each."""

    def __init__(self, signals: tuple[int, ...]) -> None:
        self.signals = signals

    def __enter__(self) -> int:
        self.reader, self.writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.handlers = {number: signal.signal(number, lambda *_: None) for number in self.signals}
        self.wakeup = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        return self.reader

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self.wakeup)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        os.close(self.reader)
        os.close(self.writer)


def interact(attachment: Attachment, *, stdin: bool, tty: bool, keys: bytes = DETACH_KEYS) -> int | None:
    """Connect our standard streams to the process until it exits; returns its exit status, or None after a detach.

    Raises the error of an ERROR frame, and Unavailable if the daemon closes the connection.
    """
    session = _Interaction(attachment, stdin=stdin, tty=tty, keys=keys)
    raw = tty and stdin
    with SignalPipe((*FORWARDED, signal.SIGWINCH)) as signals:
        if not raw:
            return session.loop(signals)
        with RawMode(STDIN):
            status = session.loop(signals)
    if session.filter.detached:
        write_all(STDERR, b"\ndetached\n")  # the cursor may be anywhere on the line
    return status


class _Interaction:
    def __init__(self, attachment: Attachment, *, stdin: bool, tty: bool, keys: bytes) -> None:
        self.attachment = attachment
        self.reading = stdin
        self.tty = tty
        self.raw = tty and stdin
        self.filter = DetachFilter(keys if self.raw else b"")
        self.done = False
        self.exit_status: int | None = None
        self.interrupts = 0

    def loop(self, signals: int) -> int | None:
        self.resize()
        while not self.done:
            for fd in self._ready(signals):
                if fd == signals:
                    for number in os.read(signals, 256):
                        self.on_signal(number)
                elif fd == STDIN:
                    self.on_input()
            self.attachment.flush()
            for kind, payload in self.attachment.receive():
                self.on_frame(kind, payload)
        return self.exit_status

    def _ready(self, signals: int) -> list[int]:
        """Wait for events; our input is not read while the daemon has not accepted earlier input."""
        if self.attachment.buffered():
            return []
        poller = select.poll()
        poller.register(signals, select.POLLIN)
        poller.register(self.attachment, select.POLLIN | (select.POLLOUT if self.attachment.pending else 0))
        if self.reading and not self.attachment.pending:
            poller.register(STDIN, select.POLLIN)
        return [fd for fd, _ in poller.poll()]

    def on_input(self) -> None:
        try:
            data = os.read(STDIN, CHUNK)
        except OSError:  # a closed or hung-up input
            data = b""
        if not data:
            self.reading = False
            self.attachment.send(Kind.STDIN_EOF)
            return
        if data := self.filter.feed(data):
            self.attachment.send(Kind.STDIN, data)
        self.done = self.done or self.filter.detached

    def on_signal(self, number: int) -> None:
        if number == signal.SIGWINCH:
            self.resize()
        elif self.raw:  # not typed, since keys arrive as bytes: it is meant for this process
            self.done, self.exit_status = True, 128 + number
        else:
            self.attachment.send(Kind.SIGNAL, bytes([number]))
            self.interrupts += number == signal.SIGINT
            if self.interrupts == ENOUGH:
                warn("detached: it ignores Ctrl-C and keeps running; `insula kill` ends it, `run --init` avoids this")
                self.done, self.exit_status = True, 128 + number

    def resize(self) -> None:
        if self.tty and (size := terminal_size()):
            self.attachment.send(Kind.RESIZE, RESIZE.pack(*size))

    def on_frame(self, kind: Kind, payload: bytes) -> None:
        if self.done:
            return
        if kind is Kind.STDOUT:
            write_all(STDOUT, payload)
        elif kind is Kind.STDERR:
            write_all(STDERR, payload)
        elif kind is Kind.EXIT:
            self.done, self.exit_status = True, loads(payload)["exit_status"]
        elif kind is Kind.ERROR:
            raise from_dict(loads(payload))


def write_all(fd: int, data: bytes) -> None:
    """Write everything, also to a descriptor that another process has made non-blocking."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            poller = select.poll()
            poller.register(fd, select.POLLOUT)
            poller.poll()
