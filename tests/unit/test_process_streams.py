"""`ProcessStreams`: who sends input and who asks for the rest of the output use one connection."""

from __future__ import annotations

import asyncio
import socket

from insula.container import wire
from insula.container.service.process_streams import ProcessStreams
from insula.model.stream import Kind
from tests.support.wait import patiently


def test_all_of_several_senders_arrives_while_the_monitor_is_slow() -> None:
    """The socket is full when the others come, and is read only afterwards."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    ours.setblocking(False)

    async def run() -> list[int]:
        streams = ProcessStreams(ours)
        senders = [asyncio.create_task(streams.send(Kind.STDIN, bytes(2 << 20))) for _ in range(2)]
        await asyncio.sleep(0.01)
        senders.append(asyncio.create_task(streams.finish()))
        await asyncio.sleep(0.01)
        assert not any(each.done() for each in senders), "the control: it is full"
        kinds: list[int] = []
        sizes = 0
        loop = asyncio.get_running_loop()
        while sizes < 4 << 20 or Kind.EXIT not in kinds:
            data = await loop.sock_recv(theirs, wire.MAX_MESSAGE)
            kinds.append(data[0])
            sizes += len(data) - 1
        await asyncio.gather(*senders)
        return kinds

    with ours, theirs:
        kinds = asyncio.run(asyncio.wait_for(run(), patiently(10)))
    assert kinds.count(Kind.EXIT) == 1
