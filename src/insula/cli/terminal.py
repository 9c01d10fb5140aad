"""A process's input and output joined to ours: raw terminal, window size, signals, detach keys.

With a terminal on both sides (`-it`) ours goes into raw mode (termios(3)): every key, Ctrl-C too, is passed on as
a byte, and the terminal *inside* the instance makes a signal of it. Without one, the signals that we get
are forwarded. One poll(2) loop serves all; signals wake it through a pipe (signal.set_wakeup_fd).
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
"""How often somebody presses Ctrl-C before we don't wait any longer for a process that ignores it."""


def detach_keys(text: str) -> bytes:
    """The bytes of a key sequence such as ``ctrl-p,ctrl-q`` or ``ctrl-x,q``; "" for none. Raises Invalid."""
    result = bytearray()
    for key in text.split(",") if text else []:
        if len(key) == 1 and key.isascii() and key.isprintable():
            result += key.encode()
        elif len(key) == 6 and key.startswith("ctrl-") and "@" <= key[5].upper() <= "_":
            result.append(ord(key[5].upper()) & 0x1F)
        else:
            raise Invalid(f"{key!r} is no key", "write keys as a or ctrl-a, separated by commas")
    return bytes(result)


class DetachFilter:
    """Watches typed bytes for the detach sequence; holds back what may be its beginning."""

    def __init__(self, keys: bytes) -> None:
        self.keys = keys
        self.detached = False
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What of `data` (and of the bytes held back) goes on to the instance."""
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
    """Rows and columns of our terminal: that of the output, else of the input; None if there is none."""
    for fd in (STDOUT, STDIN):
        try:
            size = os.get_terminal_size(fd)
        except OSError:
            continue
        return size.lines, size.columns
    return None


def require_terminal() -> None:
    """Raises Invalid unless our input is a terminal, as `-it` needs."""
    if not os.isatty(STDIN):
        raise Invalid("the input is not a terminal", "leave out -t, or run this in a terminal")


class RawMode:
    """While it is entered, the terminal at `fd` passes on every byte unchanged; afterwards it has its settings again.

    Like `SignalPipe` written without contextlib, which takes 3 ms to import.
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
    """While it is entered, the numbers of `signals` can be read from a file descriptor, a byte each, as they arrive."""

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
    """Joins our standard streams to the process until it exits; its exit status, or None when detached.

    Raises the typed error of an ERROR frame, and Unavailable when the daemon goes away.
    """
    session = _Session(attachment, stdin=stdin, tty=tty, keys=keys)
    raw = tty and stdin
    with SignalPipe((*FORWARDED, signal.SIGWINCH)) as signals:
        if not raw:
            return session.loop(signals)
        with RawMode(STDIN):
            status = session.loop(signals)
    if session.filter.detached:
        write_all(STDERR, b"\ndetached\n")  # the cursor is wherever the instance left it
    return status


class _Session:
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
        """Waits; our input is left alone while the daemon has not taken what we already read."""
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
        elif self.raw:  # nobody typed it, keys arrive as bytes: it is meant for us
            self.done, self.exit_status = True, 128 + number
        else:
            self.attachment.send(Kind.SIGNAL, bytes([number]))
            self.interrupts += number == signal.SIGINT
            if self.interrupts == ENOUGH:
                warn("let go: it ignores Ctrl-C, and goes on; `insula kill` ends it, `run --init` avoids this")
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
    """Writes everything, also to a descriptor that somebody has made non-blocking."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            poller = select.poll()
            poller.register(fd, select.POLLOUT)
            poller.poll()
