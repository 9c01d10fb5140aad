"""`Recorder`: writes events that are no change of a spec or status, such as the result of a health check or an
out-of-memory kill. (Kubernetes calls this an event recorder.)

`insula events` shows the history of the store (see events.py). So these events are written to the store as well. Each
overwrites the last event of its instance; the history keeps all of them, in one order with all other changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque

from insula.control.instances.managed import ManagedInstance
from insula.control.keys import EVENTS, INSTANCES
from insula.model.errors import InsulaError
from insula.model.objects import InstanceEvent
from insula.store.protocol import Compare, Store, TransactionConflict

_MOST = 10_000  # events that wait to be written; a full disk must not fill the memory as well
_ATTEMPTS = 5


class Recorder:
    """Writes events one after the other, in the background."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pending: deque[tuple[ManagedInstance, InstanceEvent]] = deque(maxlen=_MOST)
        self._writing: asyncio.Task[None] | None = None

    def record(self, member: ManagedInstance, action: str, **details: str | int | float | bool | None) -> None:
        """Record that `action` has just happened to the instance."""
        self._pending.append((member, InstanceEvent(time=time.time(), action=action, details=details)))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write())

    async def _write(self) -> None:
        while self._pending:
            member, event = self._pending.popleft()
            with contextlib.suppress(InsulaError):  # such as a full disk; the event is lost
                await self._put(member, event)

    async def _put(self, member: ManagedInstance, event: InstanceEvent) -> None:
        """Write an event, unless the instance was removed meanwhile: then nothing would ever delete the entry."""
        for _ in range(_ATTEMPTS):
            if member.gone:
                return
            there = Compare(INSTANCES.key(*member.key), member.revision)
            try:
                await self._store.transact([there], [EVENTS.put(event, *member.key)])
                return
            except TransactionConflict:  # its record has just changed; `revision` follows in a moment
                await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Write the events that still wait."""
        if self._writing:
            await asyncio.wait([self._writing])
