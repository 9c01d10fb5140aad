"""The bytes of a machine that moves: those of each disk reach the socket of that disk, whatever the other host does."""

from __future__ import annotations

import asyncio
import socket

import pytest

from insula.control.instances.drivers.machine.relay import DISK, MEMORY, PIECE, LinkChannel, relayed
from insula.model.errors import Failed
from insula.model.stream import MAX_PAYLOAD, Kind
from tests.support.migrations import QueueLink

CHANNELS = (DISK, LinkChannel(Kind.FURTHER, 0), LinkChannel(Kind.FURTHER, 1), MEMORY)


def test_each_disk_has_its_own_bytes_on_one_link() -> None:
    """Both ways, and as many at once as there are: a frame is never larger than it may be."""

    async def main() -> None:
        one, other = QueueLink.pair()
        sizes = list[int]()
        one.on_send = lambda _, payload: sizes.append(len(payload))
        pairs = [[socket.socketpair() for _ in CHANNELS] for _ in range(2)]
        ends = [dict(zip(CHANNELS, (ours for ours, _ in each), strict=True)) for each in pairs]
        async with relayed(one, ends[0]), relayed(other, ends[1]):
            sent = [bytes([number]) * (3 * PIECE) for number in range(len(CHANNELS))]
            loop = asyncio.get_running_loop()
            for _, theirs in (*pairs[0], *pairs[1]):
                theirs.setblocking(False)
            writing = [loop.sock_sendall(at, data) for (_, at), data in zip(pairs[0], sent, strict=True)]
            reading = [_read(at, len(data)) for (_, at), data in zip(pairs[1], sent, strict=True)]
            found = (await asyncio.gather(*writing, *reading))[len(CHANNELS) :]
            assert found == sent
        assert max(sizes) <= MAX_PAYLOAD
        for _, theirs in (*pairs[0], *pairs[1]):
            theirs.close()

    asyncio.run(main())


async def _read(at: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        found += await asyncio.get_running_loop().sock_recv(at, size)
    return found


@pytest.mark.parametrize("payload", [b"", b"\x00after", b"\x09nobody"])
def test_a_frame_that_is_of_no_disk(payload: bytes) -> None:
    """One that does not tell which ends the link; one of a disk that there is not is dropped, and others go on."""

    async def main() -> None:
        one, other = QueueLink.pair()
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        async with relayed(one, {LinkChannel(Kind.FURTHER, 0): ours}) as relay:
            await other.send(Kind.FURTHER, payload)
            await other.send(Kind.FURTHER, b"\x00more")
            if not payload:
                with pytest.raises(Failed, match="lost"):
                    await relay.told("anything")
            else:
                expected = b"more" if payload[0] else b"aftermore"
                assert await _read(theirs, len(expected)) == expected and not relay.lost.is_set()
        theirs.close()

    asyncio.run(main())
