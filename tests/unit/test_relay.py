"""What output costs the process that prints it: its bytes, and something for each piece that it comes in."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from insula.container.log import LogWriter
from insula.container.relay import BURST, CHUNK, LEAST, Client, Session
from tests.support.logs import read_log


def session(tmp_path: Path, flags: int = 0) -> tuple[Session, int, int]:
    """A session, and both ends of the pipe that its process prints to."""
    read, write = os.pipe2(flags | os.O_NONBLOCK | os.O_CLOEXEC)
    made = Session(LogWriter(str(tmp_path), 16 << 20, 2), {"tty": False, "stdin": False})
    made.add("stdout", read)
    return made, read, write


def test_packets_of_a_byte_cost_as_much_as_a_piece_does(tmp_path: Path) -> None:
    made, read, write = session(tmp_path, os.O_DIRECT)
    printed = 0
    while not made.spent:
        os.write(write, b"x")
        assert made.read(read)
        printed += 1
        assert printed <= BURST
    # what it earned meanwhile is not counted: `earn` comes when all is spent
    assert BURST // LEAST <= printed < 4 * BURST // LEAST
    assert sum(1 for _ in read_log(str(tmp_path))) == printed, "the positive control: a record each"
    os.close(write)
    made.close(read)


def test_what_is_printed_in_large_pieces_costs_its_bytes(tmp_path: Path) -> None:
    """A pipe gives all that is in it, so a program that prints as fast as it can is read in large pieces."""
    made, read, write = session(tmp_path)
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


def test_all_packets_that_were_left_are_sent(tmp_path: Path) -> None:
    """The largest pipe that a process may make for itself (fcntl(2), F_SETPIPE_SZ) is full of packets when it ends."""
    made, read, write = session(tmp_path, os.O_DIRECT)
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 1 << 20)
    printed = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"x")
            printed += 1
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client = Client(ours, stdin=False)
    made.clients.append(client)
    made.drain()
    assert printed > 64, "the positive control"
    assert b"".join(message[1:] for message in client._queue) == b"x" * printed
    for fd in (write, read):
        os.close(fd)
    ours.close()
    theirs.close()
