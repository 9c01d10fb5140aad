"""The outbox of the audit log in the store: what requests are about to do, committed with their changes.

An *intent* is the entry of a request without its result. The first transaction of a request carries it (control/
carried.py), so it is durable if and only if the change is. When the request's line is on the disk, the slot of the
intent is free again: the next intent overwrites it, which costs no deletion. After a kill, intents whose lines are not
in the log are requests whose result nobody knows; the log gets lines for them.

A slot also has the head of the log at that moment. So the store, which is another file with another owner of trust,
knows up to where the log must reach.
"""

from __future__ import annotations

import asyncio
import heapq
import json
from collections.abc import Callable
from typing import Any

import msgspec

from insula.audit.chain import ChainHead, parse_head
from insula.control.keys import OUTBOX
from insula.control.problems import Problems
from insula.model.errors import Unavailable
from insula.store.protocol import Delete, Entry, Put, Store, Write

SLOTS = 4096
"""Intents at a time: changes that are being made, or whose lines are not on the disk yet."""
_CLEANED = 60.0  # seconds until slots that a burst has left are deleted


class Outbox:
    """The slots. `head` returns the head of the log that is on the disk."""

    def __init__(self, store: Store, problems: Problems) -> None:
        self.store = store
        self.problems = problems
        self.head: Callable[[], ChainHead] = lambda: ChainHead(0, "")
        self._free: list[int] = []
        self._next = self._loaded = 0
        self._used: set[int] = set()  # free ones that the store still has
        self._cleaning: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def load(self) -> tuple[ChainHead | None, list[dict[str, Any]]]:
        """Return the last head that the store has, and the intents that the last insulad has left. They are overwritten
        only after `release_all`."""
        heads, intents = [], []
        for entry in (await self.store.list(OUTBOX)).entries:
            self._next = max(self._next, int(entry.key[len(OUTBOX) :]) + 1)
            head, intent = _decode(entry)
            heads.append(head)
            if intent:
                intents.append(intent)
        self._loaded = self._next
        return max(heads, default=None), intents

    def release_all(self) -> None:
        """Free what `load` has found: the log has it now."""
        for number in range(self._loaded):
            self.release(number)
        self._loaded = 0

    async def stored_head(self) -> ChainHead | None:
        """Return the last head that the store has."""
        heads = [_decode(entry)[0] for entry in (await self.store.list(OUTBOX)).entries]
        return max(heads, default=None)

    def take(self) -> int:
        """Return the number of a free slot. Unavailable if there is none."""
        if self._free:
            number = heapq.heappop(self._free)
            self._used.discard(number)
            return number
        if self._next >= SLOTS:
            raise Unavailable(
                "too many changes wait for the audit log", "look at the disk that holds it, and try again"
            )
        self._next += 1
        return self._next - 1

    def put(self, number: int, intent: dict[str, Any] | None) -> Put:
        """Return the write of an intent to a slot, or of a head alone."""
        return Put(f"{OUTBOX}{number}", msgspec.json.encode({"head": str(self.head()), "intent": intent}))

    def release(self, number: int) -> None:
        """Free a slot: its request's line is on the disk."""
        heapq.heappush(self._free, number)
        self._used.add(number)
        if self._cleaning is None:
            self._cleaning = asyncio.get_running_loop().call_later(_CLEANED, self._spawn_clean)

    def _spawn_clean(self) -> None:
        self._cleaning = None
        if not self._used:
            return
        task = asyncio.ensure_future(self._clean())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _clean(self) -> None:
        """Delete the slots that are free, except the first: that one gets the head of now."""
        first, *done = sorted(self._used)
        self._used.difference_update(done)
        writes: list[Write] = [self.put(first, None), *(Delete(f"{OUTBOX}{number}") for number in done)]
        await self.problems.guard("outbox of the audit log", self.store.transact([], writes, durable=False))

    def close(self) -> None:
        """Clean no more."""
        if self._cleaning is not None:
            self._cleaning.cancel()
        for task in tuple(self._tasks):
            task.cancel()


def _decode(entry: Entry) -> tuple[ChainHead, dict[str, Any] | None]:
    """Return head and intent of a slot; nothing of one that is damaged."""
    try:
        value = json.loads(entry.value)
        head = parse_head(value["head"]) if value["head"] != "0:" else ChainHead(0, "")
        intent = value["intent"]
        return head, intent if intent and isinstance(intent["id"], str) else None
    except (ValueError, KeyError, TypeError):
        return ChainHead(0, ""), None


class Intent:
    """The intent of one request, to be carried by its first transaction. `describe` returns the entry of now."""

    def __init__(self, outbox: Outbox, describe: Callable[[], dict[str, Any]]) -> None:
        self.outbox = outbox
        self.number: int | None = None
        self._describe = describe
        self._done = False

    def writes(self) -> tuple[Put, ...]:
        if self._done:
            return ()
        if self.number is None:
            self.number = self.outbox.take()
        return (self.outbox.put(self.number, self._describe()),)

    def committed(self) -> None:
        self._done = True

    def end(self) -> int | None:
        """Carry no more; returns the slot, once, to be released when the line is on the disk."""
        self._done = True
        self._describe = dict  # else the request and its body stay in memory until a full garbage collection
        number, self.number = self.number, None
        return number
