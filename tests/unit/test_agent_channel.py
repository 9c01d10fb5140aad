"""The agent's channel while the machine stands still: frames are kept back, and nothing is on its way."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from insula.agent.channel import Channel
from insula.machine import protocol

Ends = tuple[Channel, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    ours, theirs = socket.socketpair()
    os.set_blocking(theirs.fileno(), False)
    with ours, theirs:
        ours.settimeout(10)
        yield Channel(theirs.fileno()), ours


def arrived(host: socket.socket) -> list[tuple[int, int, bytes]]:
    host.setblocking(False)
    try:
        return list(protocol.FrameDecoder().feed(host.recv(1 << 20)))
    except BlockingIOError:
        return []


def test_frames_are_kept_back_and_answers_are_not(ends: Ends) -> None:
    channel, host = ends
    channel.send(3, protocol.STDOUT, b"before")
    channel.hold()
    channel.send(3, protocol.STDOUT, b"after")
    channel.answer(5, protocol.REPLY, {})
    channel.drain(10)
    assert channel.is_full, "no more output of programs is read"
    assert [(session, kind) for session, kind, _ in arrived(host)] == [(3, protocol.STDOUT), (5, protocol.REPLY)]
    channel.release()
    assert arrived(host) == [(3, protocol.STDOUT, b"after")] and not channel.is_full


def test_what_was_for_another_host_is_forgotten(ends: Ends) -> None:
    channel, host = ends
    channel.hold()
    channel.send(3, protocol.STDOUT, b"for the other")
    channel.release(forget=True)
    channel.send(7, protocol.STDOUT, b"for this one")
    assert arrived(host) == [(7, protocol.STDOUT, b"for this one")]


def test_all_has_been_sent_when_it_is_drained(ends: Ends) -> None:
    channel, host = ends
    size, sent = 200 << 10, 10
    for _ in range(sent):
        channel.send(3, protocol.STDOUT, bytes(size))
    channel.hold()
    assert channel._waiting, "the socket takes only a part"
    with pytest.raises(TimeoutError):
        channel.drain(0.01)
    pid = os.fork()
    if pid == 0:
        total = 0
        while total < sent * (size + protocol.HEADER.size):
            total += len(host.recv(1 << 20))
        os._exit(0)
    channel.drain(10)
    assert not channel._waiting
    assert os.waitpid(pid, 0)[1] == 0
