"""`OverloadControl`: keeps other hosts from sending more to this one than its link carries, and this one to others.

A receiver that is overloaded tells all other hosts what each tenant may send to it (sender_ceilings.py). They limit
that (`Fabric.limit_senders`) until the receiver tells something else, or nothing more: a receiver that has ended must
not hold up its senders.

`tell` carries these messages. No cluster does that yet, so insulad knows no other host, and nothing runs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final

from insula.control.networks import sender_ceilings
from insula.control.tasks import Tasks
from insula.model.errors import InsulaError
from insula.network.fabric import Arrivals, Fabric

log = logging.getLogger("insula.overload")
PERIOD: Final = 0.25
"""Seconds between two looks at what was dropped, and in an overload between two decisions."""
LEASE: Final = 2.0
"""Seconds that ceilings of a receiver hold. It tells them again in each period."""
_IDLE = 2.0  # seconds between two looks while no tenant has a floor
_SHARE = 20  # a look takes at most one part in so many of the time

Tell = Callable[[str, Mapping[int, int]], Awaitable[None]]
"""Tells another host, by its underlay address, what tenants, by their indices, may send to this one: bits a second."""


class OverloadControl:
    def __init__(self, fabric: Fabric, tasks: Tasks, tell: Tell | None = None) -> None:
        self._fabric = fabric
        self._tasks = tasks
        self._tell = tell
        self._others: list[str] = []
        self._known = asyncio.Event()  # there are other hosts
        self._ends: dict[str, asyncio.TimerHandle] = {}  # of the ceilings of a receiver
        self._setting = asyncio.Lock()
        self.ceilings: dict[int, int] = {}
        """What other hosts were told last, by the tenant's index."""

    def set_hosts(self, others: Iterable[str]) -> None:
        """Set the underlay addresses of the other hosts; without any, nothing runs."""
        self._others = [*others]
        (self._known.set if self._others else self._known.clear)()

    # -- as a receiver ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Watch what is dropped; decide about senders while there is an overload. It never ends."""
        dropped: int | None = None
        while True:
            await self._known.wait()
            try:
                before, dropped = dropped, await asyncio.to_thread(self._fabric.dropped_arrivals)
                if None not in (before, dropped) and before != dropped:
                    await self._relieve()
                    continue
            except (InsulaError, OSError) as error:
                log.warning("what arrives at this host can't be measured: %s", error)
                dropped = None
            await asyncio.sleep(_IDLE if dropped is None else PERIOD)

    async def _relieve(self) -> None:
        """Limit senders until there is no overload, and no ceiling is left."""
        before, began, cost = await self._arrivals()
        while before:
            await asyncio.sleep(max(PERIOD, cost * _SHARE))
            after, now, cost = await self._arrivals()
            if after is None:
                break
            arrived = sender_ceilings.rates(before, after, now - began)
            had, self.ceilings = self.ceilings, sender_ceilings.decide(self.ceilings, arrived, after.floors, after.link)
            if had or self.ceilings:
                await self._tell_others()
            elif not sender_ceilings.is_overloaded(arrived, after.link):
                return
            before, began = after, now
        self.ceilings = {}
        await self._tell_others()

    async def _arrivals(self) -> tuple[Arrivals | None, float, float]:
        """What has arrived, the time, and the seconds that the look at it took."""
        began = time.monotonic()
        found = await asyncio.to_thread(self._fabric.arrivals)
        now = time.monotonic()
        return found, now, now - began

    async def _tell_others(self) -> None:
        if self._tell is not None:
            told = [self._tell(host, self.ceilings) for host in self._others]
            for host, error in zip(self._others, await asyncio.gather(*told, return_exceptions=True), strict=True):
                if isinstance(error, Exception):  # its ceilings end by themselves, and are told again
                    log.warning("host %s can't be told what it may send: %s", host, error)

    # -- as a sender -----------------------------------------------------------------------------------------------

    async def limit(self, receiver: str, ceilings: Mapping[int, int]) -> None:
        """Limit what tenants send to another host, which has told so. It ends after `LEASE` seconds."""
        if end := self._ends.pop(receiver, None):
            end.cancel()
        if ceilings:
            loop = asyncio.get_running_loop()
            self._ends[receiver] = loop.call_later(LEASE, self._end, receiver)
        async with self._setting:
            await asyncio.to_thread(self._fabric.limit_senders, receiver, ceilings)

    def _end(self, receiver: str) -> None:
        self._tasks.spawn(self.limit(receiver, {}))
