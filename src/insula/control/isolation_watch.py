"""`IsolationWatch`: proves the isolation of tenants again and again, and tells what has changed.

The kernel tells of changes in the namespaces of tenants and of the host. Where another program than insulad has changed
something, that tenant is proven at once, and no other. Beside this, all are proven every so often: what the kernel does
not tell, and what others change while insulad does, is found then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from insula.control.context import Context
from insula.control.keys import TENANTS
from insula.control.networks.controller import NetworkController
from insula.control.proof_schedule import ProofSchedule
from insula.control.tasks import Tasks
from insula.control.verify import Verifier
from insula.model.errors import InsulaError
from insula.network.fabric import ChangeMonitor

log = logging.getLogger("insula.isolation")
_WAITING: Final = 1000
"""Events that wait for one reader; a reader that is slower misses some."""
_TOGETHER: Final = 0.1  # seconds from a change until what has changed is read: changes come in groups
_USUAL: Final = 60.0  # seconds between two passes if the settings name none


class IsolationWatch:
    """It watches if the settings say so, and as long as somebody reads `watched`. `proofs` counts those of each tenant,
    and of the host (None); `last` is when the last pass over all ended, in seconds since the epoch."""

    def __init__(self, context: Context, verifier: Verifier, networks: NetworkController, tasks: Tasks) -> None:
        self._context, self._verifier, self._networks, self._tasks = context, verifier, networks, tasks
        self._readers: set[asyncio.Queue[dict[str, Any]]] = set()
        self._monitors: set[ChangeMonitor] = set()
        self._schedule, self._woken, self._first = ProofSchedule(), asyncio.Event(), asyncio.Event()
        self._found: dict[str | None, tuple[str, ...]] = {}
        self._watching = 0
        self._task: asyncio.Task[None] | None = None
        self.proofs = Counter[str | None]()
        self.last = 0.0

    @property
    def findings(self) -> Mapping[str | None, Sequence[str]] | None:
        """What was found last, by tenant; None before the first pass over all has ended."""
        return self._found if self._first.is_set() else None

    def begin(self) -> None:
        """Watch from now on, if the settings say so."""
        if self._context.settings.network.verify_seconds is not None:
            self._hold()

    # -- readers ---------------------------------------------------------------------------------------------------

    async def changes(self) -> AsyncIterator[dict[str, Any]]:
        """Yield an event for each finding that appears or is gone, from now on, without end."""
        mine = asyncio.Queue[dict[str, Any]]()
        self._readers.add(mine)
        try:
            while True:
                yield await mine.get()
        finally:
            self._readers.discard(mine)

    async def watched(self) -> AsyncIterator[dict[str, Any]]:
        """Yield an event when the first pass has ended, one for each of its findings, and then `changes`. Until its
        end there is a watch."""
        self._hold()
        mine = asyncio.Queue[dict[str, Any]]()
        try:
            await self._first.wait()
            self._readers.add(mine)
            found = [(tenant, text) for tenant, texts in self._found.items() for text in texts]
            yield {**_event("proven", None, f"{len(found)} findings"), "findings": len(found)}
            for tenant, text in found:
                yield _event("drifted", tenant, text)
            while True:
                yield await mine.get()
        finally:
            self._readers.discard(mine)
            self._release()

    def _hold(self) -> None:
        self._watching += 1
        if self._watching == 1:
            self._task = self._tasks.spawn(self._run())

    def _release(self) -> None:
        self._watching -= 1
        if not self._watching and self._task:
            self._task.cancel()

    def _tell(self, action: str, tenant: str | None, text: str) -> None:
        for reader in self._readers:
            if reader.qsize() < _WAITING:
                reader.put_nowait(_event(action, tenant, text))

    # -- proofs ----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Watch until it is cancelled."""
        self._loop = asyncio.get_running_loop()
        interval = self._context.settings.network.verify_seconds or _USUAL
        try:
            await asyncio.to_thread(self._context.fabric.watch, self)
            await asyncio.gather(self._prove_all(interval), self._prove_changed())
        finally:
            self._found.clear()
            self._first.clear()
            self._context.problems.solved("isolation")
            with suppress(InsulaError):  # everything was taken down
                await asyncio.to_thread(self._context.fabric.watch, None)

    async def _prove_all(self, interval: float) -> None:
        """Prove all tenants and the host, every `interval` seconds."""
        while not self._context.going_down.is_set():
            names = [tenant.name for tenant in await TENANTS.readable(self._context.store)]
            for name in {each for each in self._found if each} - set(names):
                self._forget(name)
            for subject in (*names, None):
                await self._prove(subject)
            self.last = time.time()
            self._first.set()
            await asyncio.sleep(interval)

    async def _prove_changed(self) -> None:
        """Prove those of which a change was told, when they are due."""
        while True:
            due = self._schedule.due()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), None if due is None else max(0.0, due - time.monotonic()))
            self._woken.clear()
            for tenant in self._schedule.take(time.monotonic()):
                began = time.monotonic()
                await self._prove(tenant)
                await asyncio.sleep(time.monotonic() - began)  # all proofs together leave half of a processor to others

    async def _prove(self, tenant: str | None) -> None:
        """Prove a tenant, or the host, and tell the differences from the last time."""
        try:
            found = await (self._verifier.prove_host() if tenant is None else self._verifier.prove(tenant))
        except (InsulaError, OSError) as error:  # it is being removed, or everything is
            log.info("isolation of %s could not be proven: %s", tenant or "the host", error)
            return
        self.proofs[tenant] += 1
        self.look(tenant, found)

    def look(self, tenant: str | None, found: Sequence[str]) -> None:
        """Take what a proof has found, and tell the differences from the last one. What is new is repaired, if the
        settings say so."""
        before, now = self._found.get(tenant, ()), tuple(dict.fromkeys(found))
        self._found[tenant] = now
        new = [text for text in now if text not in before]
        for text in new:
            log.warning("%s", text)
            self._tell("drifted", tenant, text)
        for text in before:
            if text not in now:
                self._tell("restored", tenant, text)
        if new and self._context.settings.network.repair:
            self._repair(tenant)
        self._report()

    def _report(self) -> None:
        every = [text for texts in self._found.values() for text in texts]
        if every:
            more = f" ({len(every)} findings)" if len(every) > 1 else ""
            self._context.problems["isolation"] = f"{every[0]}{more}"
        else:
            self._context.problems.solved("isolation")

    def _repair(self, tenant: str | None) -> None:
        """Have what a tenant wants, or the host's rules, installed again."""
        if tenant is not None:
            self._networks.nudge(tenant)
        else:
            work = asyncio.to_thread(self._context.fabric.repair_host)
            self._tasks.spawn(self._context.problems.guard("repair of the host's network", work))

    def _forget(self, tenant: str) -> None:
        """Forget a tenant that was removed."""
        self.look(tenant, ())
        del self._found[tenant], self.proofs[tenant]
        self._schedule.forget(tenant)

    # -- what the kernel tells -------------------------------------------------------------------------------------

    def opened(self, tenant: str | None, monitor: ChangeMonitor) -> None:
        self._later(self._opened, tenant, monitor)

    def closed(self, tenant: str | None, monitor: ChangeMonitor) -> None:
        self._later(self._closed, monitor)

    def _later(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function in the event loop's thread, to which monitors belong."""
        with suppress(RuntimeError):  # the loop has ended, and with it this process
            self._loop.call_soon_threadsafe(function, *arguments)

    def _opened(self, tenant: str | None, monitor: ChangeMonitor) -> None:
        self._monitors.add(monitor)
        self._listen(tenant, monitor)

    def _closed(self, monitor: ChangeMonitor) -> None:
        self._monitors.discard(monitor)
        self._ignore(monitor)
        monitor.close()

    def _listen(self, tenant: str | None, monitor: ChangeMonitor) -> None:
        for number in monitor.filenos():
            self._loop.add_reader(number, self._readable, tenant, monitor)

    def _ignore(self, monitor: ChangeMonitor) -> None:
        for number in monitor.filenos():
            self._loop.remove_reader(number)

    def _readable(self, tenant: str | None, monitor: ChangeMonitor) -> None:
        self._ignore(monitor)
        self._loop.call_later(_TOGETHER, self._read, tenant, monitor)

    def _read(self, tenant: str | None, monitor: ChangeMonitor) -> None:
        """Read what has changed. What insulad has changed matters if there are findings: it may have repaired them."""
        if monitor not in self._monitors:
            return
        changed = monitor.read()
        self._listen(tenant, monitor)
        if changed.other or (changed.own and self._found.get(tenant)):
            self._schedule.changed(tenant, time.monotonic())
            self._woken.set()


def _event(action: str, tenant: str | None, text: str) -> dict[str, Any]:
    name = "host" if tenant is None else None
    return {"time": time.time(), "kind": "isolation", "action": action, "tenant": tenant, "name": name, "text": text}
