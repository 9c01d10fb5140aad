"""The monitor never waits for the zygote, since it has the streams of all containers."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator

import pytest

from insula.container import wire
from insula.container.service.zygote_supervisor import ZygoteSupervisor
from insula.kernel.event_loop import EventLoop


@pytest.fixture
def ends() -> Iterator[tuple[ZygoteSupervisor, socket.socket, socket.socket, list[wire.Message]]]:
    """A monitor's view of a zygote, both ends of the channel, and what it was told. A read that would wait fails."""
    heard: list[wire.Message] = []
    loop = EventLoop("test")
    supervisor = ZygoteSupervisor(loop, "/nowhere", "build", 0)
    supervisor.on_message = lambda message, _: heard.append(message)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.settimeout(5)
        supervisor._channel = ours
        yield supervisor, ours, theirs, heard
    loop._poll.close()


def test_a_message_read_in_the_same_turn_is_not_awaited(
    ends: tuple[ZygoteSupervisor, socket.socket, socket.socket, list[wire.Message]],
) -> None:
    """A client attaches in the turn of the loop in which the zygote's message came: the channel was found readable,
    and what was there is handled for the client's sake."""
    supervisor, ours, theirs, heard = ends
    wire.send(theirs, {"event": "first"})
    assert supervisor.receive_waiting(), "for the client"
    supervisor._ready(ours, select.EPOLLIN)
    assert heard == [{"event": "first"}]
    wire.send(theirs, {"event": "second"})
    supervisor._ready(ours, select.EPOLLIN)
    assert heard[1:] == [{"event": "second"}], "the control: what is there is read"


def test_a_channel_that_was_replaced_in_the_same_turn_is_not_read(
    ends: tuple[ZygoteSupervisor, socket.socket, socket.socket, list[wire.Message]],
) -> None:
    supervisor, ours, theirs, heard = ends
    wire.send(theirs, {"event": "late"})
    before, after = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with before, after:
        supervisor._channel = before
        supervisor._ready(ours, select.EPOLLIN)
        assert heard == []
