"""Moves of guests in one process: the link between two hosts is a pair of queues."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from insula.control.instances.drivers.machine import moving
from insula.control.instances.drivers.machine.shim import ask
from insula.model.stream import Kind
from tests.support.guests import Guest
from tests.support.wait import until

Frame = tuple[Kind, bytes]


class QueueLink:
    """One end of a link. `cut` ends both directions, as a connection that is lost."""

    def __init__(self, out: asyncio.Queue[Frame | None], into: asyncio.Queue[Frame | None]) -> None:
        self._out, self._into = out, into
        self.carried = dict.fromkeys((Kind.MESSAGE, Kind.DISK, Kind.MEMORY, Kind.FURTHER), 0)
        self.on_send: Callable[[Kind, bytes], None] = lambda *_: None
        self.is_cut = False

    @classmethod
    def pair(cls) -> tuple[QueueLink, QueueLink]:
        one, other = asyncio.Queue[Frame | None](8), asyncio.Queue[Frame | None](8)
        return cls(one, other), cls(other, one)

    async def send(self, kind: Kind, payload: bytes = b"") -> None:
        self.on_send(kind, payload)
        if self.is_cut:
            raise ConnectionResetError
        self.carried[kind] += len(payload)
        await self._out.put((kind, payload))

    async def next(self) -> Frame | None:
        frame = None if self.is_cut else await self._into.get()
        return None if self.is_cut else frame

    async def cut(self) -> None:
        self.is_cut = True
        for queue in (self._out, self._into):
            while queue.full():
                queue.get_nowait()
            queue.put_nowait(None)


class Output:
    """What a guest's first program says, read as it comes."""

    def __init__(self, guest: Guest) -> None:
        self.lines: list[str] = []
        self.times: list[float] = []  # when each has come (time.monotonic)
        self._stream = guest.process.stdout
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        assert self._stream
        for line in self._stream:
            self.times.append(time.monotonic())
            self.lines.append(line.strip())

    @property
    def numbers(self) -> list[int]:
        return [int(each) for each in self.lines if each.isdigit()]

    def goes_on(self) -> None:
        seen = len(self.lines)
        until(lambda: len(self.lines) > seen + 5, "it goes on", 60)


def describe(guest: Guest) -> dict[str, Any]:
    until(lambda: asyncio.run(ask(guest.netns(), {"ask": "ready"})), "it runs", 60)
    found = asyncio.run(ask(guest.netns(), {"ask": "describe"}))
    assert found
    return found


class Move:
    """Moves a guest to another one, which waits. `given` and `owned` are the records of both hosts."""

    def __init__(self, source: Guest, target: Guest) -> None:
        self.source, self.target = source, target
        self.netns: list[Callable[[], int]] = [source.netns, target.netns]
        self.given: list[Any] = []
        self.owned: list[Any] = []
        self.carried: dict[Kind, int] = {}
        self.seconds = 0.0
        self.on_own: Callable[[], object] = lambda: None

    def run(self, during: Callable[[QueueLink, QueueLink], Awaitable[object]] | None = None) -> list[Any]:
        """What both sides have returned or raised."""

        async def run() -> list[Any]:
            ours, theirs = QueueLink.pair()

            async def give(numbers: dict[str, int]) -> None:
                self.given.append(numbers)

            async def own(numbers: dict[str, int]) -> None:
                self.owned.append(numbers)
                self.on_own()

            begun = time.monotonic()
            work = [
                moving.leave(self.netns[0], ours, give),
                moving.arrive(self.netns[1], theirs, own),
            ]
            also = [during(ours, theirs)] if during else []
            found = await asyncio.gather(*work, *also, return_exceptions=True)
            self.carried, self.seconds = ours.carried, time.monotonic() - begun
            return found[:2]

        return asyncio.run(run())
