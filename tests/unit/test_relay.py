"""The cost of output to the process that prints it: its bytes, and a part for each piece."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import socket
import struct
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insula.container.log import LogWriter
from insula.container.service.relay import BURST, CHUNK, LEAST, RATE, AttachedClient, Session
from insula.model.stream import RESIZE, Kind
from tests.support.logs import read_log


@pytest.fixture
def log(tmp_path: Path) -> Iterator[LogWriter]:
    with contextlib.closing(LogWriter(str(tmp_path), 16 << 20, 2)) as writer:
        yield writer


def session(log: LogWriter, flags: int = 0) -> tuple[Session, int, int]:
    """A session, and both ends of the pipe that its process prints to."""
    read, write = os.pipe2(flags | os.O_NONBLOCK | os.O_CLOEXEC)
    made = Session(log, {"tty": False, "stdin": False})
    made.add("stdout", read)
    return made, read, write


def test_packets_of_a_byte_cost_as_much_as_a_piece_does(tmp_path: Path, log: LogWriter) -> None:
    made, read, write = session(log, os.O_DIRECT)
    printed = 0
    while not made.throttled:
        os.write(write, b"x")
        assert made.read(read)
        printed += 1
        assert printed <= BURST
    # what it earned meanwhile is not counted: `refill` comes when all is spent
    assert BURST // LEAST <= printed < 4 * BURST // LEAST
    assert sum(1 for _ in read_log(str(tmp_path))) == printed, "the positive control: a record each"
    os.close(write)
    made.close(read)


def test_large_pieces_cost_their_bytes(log: LogWriter) -> None:
    """A pipe gives all that is in it, so a program that prints as fast as it can is read in large pieces."""
    made, read, write = session(log)
    for piece in (b"x", b"x" * 100, b"x" * LEAST, b"x" * CHUNK):
        before = made._credit
        os.write(write, piece)
        assert made.read(read)
        assert before - made._credit == max(LEAST, len(piece))
    before = made._credit
    for _ in range(1000):
        os.write(write, b"a line\n")
    assert made.read(read)
    assert before - made._credit == 7000
    os.close(write)
    made.close(read)


def test_output_is_held_up_when_the_burst_is_spent_and_not_before(
    log: LogWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No time passes meanwhile, so nothing is earned."""
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    made, read, write = session(log)
    made.reset_quota()
    piece = 1 << 16
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, piece)
    printed = 0
    while made.wants(read):
        os.write(write, bytes(piece))
        while select.select([read], [], [], 0)[0] and made.wants(read):
            assert made.read(read)
        printed += piece
        assert printed <= BURST
    assert printed == BURST and made.throttled
    monkeypatch.setattr(time, "monotonic", lambda: 1000.5)
    made.refill()
    assert made.wants(read) and made._credit == RATE / 2
    os.close(write)
    made.close(read)


def test_all_packets_that_were_left_are_sent(log: LogWriter) -> None:
    """The largest pipe that a process may make for itself (fcntl(2), F_SETPIPE_SZ) is full of packets when it ends."""
    made, read, write = session(log, os.O_DIRECT)
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 1 << 20)
    printed = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"x")
            printed += 1
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client = AttachedClient(ours, stdin=False)
    made.clients.append(client)
    made.drain()
    assert printed > 64, "the positive control"
    assert b"".join(message[1:] for message in client._queue) == b"x" * printed
    for fd in (write, read):
        os.close(fd)
    ours.close()
    theirs.close()


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def plain(*, stdin: bool = True, tty: bool = False, discard: bool = False) -> Session:
    """A session without a log."""
    return Session(None, {"tty": tty, "stdin": stdin}, discard=discard)


def test_a_client_gets_all_in_order_and_what_waits_is_counted(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    client = AttachedClient(ours, stdin=False)
    pieces = [bytes([n]) * CHUNK for n in range(40)]
    for piece in pieces:
        client.push(Kind.STDERR, piece)
    assert client.backlog == 40 * (CHUNK + 1) and client.full
    assert client.flush(), "the socket takes no more, and the client is there"
    assert 0 < client.backlog < 40 * (CHUNK + 1), "the positive control: some of it went"
    received: list[bytes] = []
    while len(received) < 40:
        received.append(theirs.recv(CHUNK + 1))
        assert client.flush()
    assert received == [bytes([Kind.STDERR]) + piece for piece in pieces]
    assert client.backlog == 0 and not client.full
    client.push(Kind.STDIN_EOF)
    client.closing = True
    assert not client.flush() and theirs.recv(10) == bytes([Kind.STDIN_EOF]), "it goes when its backlog has gone"


def test_a_client_is_too_far_behind_from_a_mebibyte_on(ends: tuple[socket.socket, socket.socket]) -> None:
    client = AttachedClient(ends[0], stdin=False)
    client.push(Kind.STDOUT, bytes((1 << 20) - 1))
    assert client.backlog == 1 << 20 and not client.full
    client.push(Kind.STDOUT)
    assert client.full


def test_a_disconnected_client_is_reported(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    client = AttachedClient(ours, stdin=False)
    assert client.flush(), "nothing to send"
    theirs.close()
    client.push(Kind.STDOUT, b"x")
    assert not client.flush()


def test_output_is_read_if_a_client_takes_it_and_none_is_too_far_behind(
    log: LogWriter, ends: tuple[socket.socket, socket.socket]
) -> None:
    read, write = os.pipe()
    for made, wanted in (
        (plain(), False),
        (plain(discard=True), True),
        (Session(log, {"tty": False, "stdin": False}), True),
    ):
        assert not made.wants(read), "it is not among its streams"
        made.add("stdout", read)
        assert made.wants(read) == wanted and not made.wants(write)
        client = AttachedClient(ends[0], stdin=False)
        made.clients.append(client)
        assert made.wants(read), "there is a client"
        client.push(Kind.STDOUT, bytes(2 << 20))
        assert not made.wants(read)
        made.clients.append(AttachedClient(ends[1], stdin=False))
        assert not made.wants(read), "the slowest one holds it up"
        made.clients.clear()
        made._credit = 0.0
        assert not made.wants(read) and made.throttled, "all is spent"
        made.refill()
        made._credit = 1.0
        assert made.wants(read) == wanted and not made.throttled
    os.close(read)
    os.close(write)


def test_credit_is_earned_with_time_and_has_a_most() -> None:
    made = plain(discard=True)
    assert made._credit == BURST
    made._since -= 1000.0
    made.refill()
    assert made._credit == BURST, "no more than that after a silence"
    made._credit = -float(RATE)
    made._since -= 3.0
    made.refill()
    assert made._credit >= 2 * RATE, "three seconds' worth"
    first = made._since
    made.refill()
    assert made._since >= first and made._credit < 3 * RATE, "a second is earned once"
    made.reset_quota()
    assert made._credit == BURST


def test_output_to_clients_only_costs_nothing(ends: tuple[socket.socket, socket.socket]) -> None:
    """They hold it up by themselves."""
    read, write = os.pipe()
    for discard in (False, True):
        made = plain(discard=discard)
        made.add("stderr", read)
        made.clients.append(AttachedClient(ends[0], stdin=False))
        os.write(write, b"x" * 2000)
        assert made.read(read)
        assert made._credit == BURST - (2000 if discard else 0)
        assert made.clients[0]._queue[0] == bytes([Kind.STDERR]) + b"x" * 2000
    os.close(write)
    assert not made.read(read), "its end"
    os.close(read)


def test_no_data_is_not_the_end() -> None:
    read, write = os.pipe2(os.O_NONBLOCK)
    made = plain(discard=True)
    made.add("stdout", read)
    assert made.read(read)
    os.close(write)
    assert not made.read(read)
    os.close(read)
    with pytest.raises(OSError, match="Bad file descriptor"):
        made.read(read)


def test_a_terminal_ends_when_its_other_side_is_closed() -> None:
    ours, theirs = pty.openpty()
    made = plain(tty=True, discard=True)
    made.add("tty", ours)
    os.close(theirs)
    assert not made.read(ours), "read(2) answers EIO"
    assert made.close(ours) == "tty" and made.terminal is None


@given(st.lists(st.binary(max_size=100), max_size=5), st.booleans())
def test_input_reaches_the_process_whole_and_then_its_end(pieces: list[bytes], before: bool) -> None:
    """Also what comes before the process has opened its input."""
    read, write = os.pipe2(os.O_NONBLOCK)
    made = plain()
    if not before:
        made.add("stdin", write)
    for piece in pieces:
        made.receive(Kind.STDIN, piece)
        assert made.write()
    made.receive(Kind.STDIN_EOF, b"")
    if before:
        assert made.write(), "not open yet: that is no end"
        made.add("stdin", write)
    assert not made.write(), "to be closed"
    assert made.close(write) == "stdin" and made.input is None
    with open(read, "rb") as file:
        assert file.read() == b"".join(pieces)


def test_input_that_the_process_does_not_take_waits() -> None:
    read, write = os.pipe2(os.O_NONBLOCK)
    made = plain()
    made.add("stdin", write)
    made.receive(Kind.STDIN, bytes(200_000))
    assert made.write() and 0 < len(made.stdin_buffer) < 200_000
    made.receive(Kind.STDIN_EOF, b"")
    assert made.write(), "its end comes after what waits"
    received = 0
    while made.stdin_buffer:
        received += len(os.read(read, 1 << 20))
        made.write()
    assert received + len(os.read(read, 1 << 20)) == 200_000
    assert not made.write()
    os.close(read)
    made.ended = False
    made.receive(Kind.STDIN, b"x")
    assert not made.write() and not made.stdin_buffer, "nobody reads it any more"
    made.close(write)
    made.receive(Kind.STDIN, b"x")
    assert made.stdin_closed and not made.stdin_buffer, "it was closed"


def test_a_process_without_input_gets_none() -> None:
    for made, heard in ((plain(stdin=False), b""), (plain(), b"x"), (plain(stdin=False, tty=True), b"x")):
        made.receive(Kind.STDIN, b"x")
        assert made.stdin_buffer == heard


def test_the_size_of_a_terminal() -> None:
    def size(fd: int) -> tuple[int, ...]:
        return struct.unpack("4H", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))

    ours, theirs = pty.openpty()
    made = plain(tty=True)
    made.receive(Kind.RESIZE, RESIZE.pack(24, 80))
    made.add("tty", ours)
    assert size(theirs) == (24, 80, 0, 0), "what was said before it was open"
    made.receive(Kind.RESIZE, RESIZE.pack(50, 132))
    assert size(theirs) == (50, 132, 0, 0)
    for damaged in (b"", b"\0\1\0", RESIZE.pack(1, 1) + b"x"):
        made.receive(Kind.RESIZE, damaged)
    made.receive(Kind.SIGNAL, RESIZE.pack(1, 1))
    assert size(theirs) == (50, 132, 0, 0)
    made.receive(Kind.STDIN_EOF, b"")
    assert made.write(), "a terminal is not closed by the end of the input: its output goes on"
    os.close(theirs)
    made.close(ours)


def test_a_stream_that_comes_twice_is_closed() -> None:
    """From a zygote that hands over copies to another monitor."""
    (first, write), (second, other) = os.pipe(), os.pipe()
    made = plain(discard=True)
    made.add("stdout", first)
    made.add("stdout", second)
    assert made.names == {first: "stdout"} and made.outputs == {first: Kind.STDOUT}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(second)
    os.close(write)
    os.close(other)
    assert made.close(first) == "stdout" and not made.names and not made.outputs


def test_a_process_that_left_others_behind_is_not_read_for_ever(log: LogWriter) -> None:
    """Each piece that is read makes room for the next; a pipe that is never empty has no end."""
    made, read, write = session(log)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    class Refilling(AttachedClient):
        def push(self, kind: Kind, data: bytes = b"") -> None:
            super().push(kind, data)
            os.write(write, b"more")

    client = Refilling(ours, stdin=False)
    made.clients.append(client)
    os.write(write, b"more")
    made.drain()
    assert len(client._queue) == 256, "as many packets as the largest pipe holds"
    for fd in (write, read):
        os.close(fd)
    ours.close()
    theirs.close()
