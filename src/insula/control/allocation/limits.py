"""`TenantLimits`: the limits of all tenants in memory, as the store has them.

Limits on what requests do now, and how many there are, are looked up for each request, so that is done without the
store. It follows the store's changes; those of this daemon are applied at once (`take`).
"""

from __future__ import annotations

import asyncio
import logging

from insula.control.keys import TENANTS
from insula.control.problems import Problems
from insula.control.tasks import Tasks
from insula.model.errors import Failed
from insula.model.objects import Limits
from insula.store.protocol import Compacted, Entry, Store

log = logging.getLogger("insula.control")
_NONE = Limits()
_PAUSE = 1.0  # seconds until the store is asked again after a failure


class TenantLimits:
    def __init__(self, store: Store, problems: Problems) -> None:
        self._store = store
        self._problems = problems
        self._limits: dict[str, tuple[int, Limits]] = {}  # with the revisions that they are of

    def of(self, tenant: str) -> Limits:
        """The limits of a tenant; none if there is no such tenant, or if its record is damaged."""
        found = self._limits.get(tenant)
        return found[1] if found else _NONE

    def take(self, tenant: str, limits: Limits, revision: int) -> None:
        """Apply limits that were committed at `revision`, unless later ones are known."""
        if revision > self._limits.get(tenant, (0, _NONE))[0]:
            self._limits[tenant] = revision, limits

    async def load(self, tasks: Tasks) -> None:
        """Read all limits, and follow the store from then on."""
        tasks.spawn(self._follow(await self._read()))

    async def _read(self) -> int:
        """Read all limits, and return the store's revision."""
        snapshot = await self._store.list(TENANTS.prefix_all())
        names = {TENANTS.parts(entry.key)[0] for entry in snapshot.entries}
        for name in [name for name in self._limits if name not in names]:
            del self._limits[name]
        for entry in snapshot.entries:
            self._decode(entry)
        return snapshot.revision

    def _decode(self, entry: Entry) -> None:
        try:
            tenant = TENANTS.decode(entry)
        except Failed as error:  # also a problem of this host, which somebody else records
            log.error("%s", error)
        else:
            self.take(tenant.name, tenant.limits, entry.revision)

    async def _follow(self, revision: int) -> None:
        while True:
            try:
                async for event in self._store.watch(TENANTS.prefix_all(), revision):
                    revision = event.revision
                    if event.kind == "put":
                        self._decode(event.entry)
                    else:
                        self._limits.pop(TENANTS.parts(event.entry.key)[0], None)
                return  # the store is closed
            except Compacted:
                revision = await self._read()
            except Exception as error:
                self._problems.report("changes of limits", error)
                await asyncio.sleep(_PAUSE)
