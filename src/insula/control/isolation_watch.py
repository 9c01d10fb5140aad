"""`IsolationWatch`: proves the isolation of tenants again and again, and tells what has changed.

A pass takes what has changed since the last one: the proof of a tenant whose rules, devices, routes and intent are the
same is not computed again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any, Final

from insula.control.context import Context
from insula.control.verify import Verifier
from insula.model.errors import InsulaError

log = logging.getLogger("insula.isolation")
_WAITING: Final = 1000
"""Events that wait for one reader; a reader that is slower misses some."""


class IsolationWatch:
    """`findings` are those of the last pass, as text; None before the first."""

    def __init__(self, context: Context, verifier: Verifier) -> None:
        self._context = context
        self._verifier = verifier
        self._readers: set[asyncio.Queue[dict[str, Any]]] = set()
        self.findings: tuple[str, ...] | None = None
        self.passes = 0
        self.last = 0.0  # when the last pass ended, seconds since the epoch

    async def run(self) -> None:
        """Prove every so often, as the settings say. It never ends; with "off" nothing happens."""
        if (interval := self._context.settings.network.verify_seconds) is None:
            return
        while not self._context.going_down.is_set():
            try:
                self.look(await self._verifier.prove())
            except InsulaError as error:  # a tenant is removed meanwhile, or all are
                log.info("isolation could not be proven: %s", error)
            await asyncio.sleep(interval)

    def look(self, found: Any) -> None:
        """Take the findings of a pass, and tell the differences from those of the last one."""
        before, now = self.findings or (), tuple(dict.fromkeys(found))
        self.findings, self.passes, self.last = now, self.passes + 1, time.time()
        for text in now:
            if text not in before:
                log.warning("%s", text)
                self._tell("drifted", text)
        for text in before:
            if text not in now:
                self._tell("restored", text)
        if now:
            self._context.problems["isolation"] = f"{now[0]}" + (f" ({len(now)} findings)" if len(now) > 1 else "")
        else:
            self._context.problems.solved("isolation")

    def _tell(self, action: str, text: str) -> None:
        event = {
            "time": time.time(),
            "kind": "isolation",
            "action": action,
            "tenant": None,
            "name": "host",
            "text": text,
        }
        for reader in self._readers:
            if reader.qsize() < _WAITING:
                reader.put_nowait(event)

    async def changes(self) -> AsyncIterator[dict[str, Any]]:
        """Yield an event for each finding that appears or is gone, from now on, without end."""
        mine = asyncio.Queue[dict[str, Any]]()
        self._readers.add(mine)
        try:
            while True:
                yield await mine.get()
        finally:
            self._readers.discard(mine)
