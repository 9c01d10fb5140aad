"""Events that are no change of wanted or measured state: a check's verdict, a process killed for want of memory.

`insula events` is the history of the store (see events.py). So what merely happened is put there too, each event over
the last one of its instance: the history keeps all, for as long as it keeps anything, and who watches sees them in one
order with everything else. Kubernetes calls what does this an event recorder.
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

_MOST = 10_000  # waiting to be written: a full disk must not fill memory as well
_ATTEMPTS = 5


class Recorder:
    """Writes events one after the other, behind the callers' backs."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pending: deque[tuple[ManagedInstance, InstanceEvent]] = deque(maxlen=_MOST)
        self._writing: asyncio.Task[None] | None = None

    def record(self, member: ManagedInstance, action: str, **details: str | int | float | bool | None) -> None:
        """Tells whoever watches that `action` happened to the instance just now."""
        self._pending.append((member, InstanceEvent(time=time.time(), action=action, details=details)))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write())

    async def _write(self) -> None:
        while self._pending:
            member, event = self._pending.popleft()
            with contextlib.suppress(InsulaError):  # a full disk: the host has worse trouble than a missing event
                await self._put(member, event)

    async def _put(self, member: ManagedInstance, event: InstanceEvent) -> None:
        """Unless the instance was removed meanwhile: then nobody would ever take the entry away."""
        for _ in range(_ATTEMPTS):
            if member.gone:
                return
            there = Compare(INSTANCES.key(*member.key), member.revision)
            try:
                await self._store.transact([there], [EVENTS.put(event, *member.key)])
                return
            except TransactionConflict:  # what is wanted of it has just changed: `revision` follows in a moment
                await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Writes what is still waiting."""
        if self._writing:
            await asyncio.wait([self._writing])
