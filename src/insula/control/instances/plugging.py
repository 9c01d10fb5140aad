"""`plug` and `unplug`: make the ports of an instance match the wanted ones, while it runs or not.

A port that is unplugged while the instance runs is blocked and deleted first. Its counters are read after that, so
that its whole traffic is in the instance's account, and only then they are deleted, and the port with its addresses in
the store. If the daemon is killed in between, the next one does the same again.
"""

from __future__ import annotations

from collections.abc import Awaitable
from contextlib import suppress

import msgspec

from insula.control.accounting.accounts import Accounts
from insula.control.context import Context
from insula.control.instances.drivers.base import Driver
from insula.control.instances.managed import ManagedInstance
from insula.control.instances.statuses import Statuses
from insula.control.keys import INSTANCES
from insula.control.networks.ports import Ports, port_reservations
from insula.model.errors import NotFound
from insula.model.objects import Port
from insula.network.fabric import Nic
from insula.store.protocol import Compare, TransactionConflict


class Plugging:
    """The actions PLUG and UNPLUG. The caller holds the instance's lock."""

    def __init__(self, context: Context, ports: Ports, statuses: Statuses, accounts: Accounts) -> None:
        self.context = context
        self.ports = ports
        self.statuses = statuses
        self.accounts = accounts

    async def plug(self, managed: ManagedInstance, driver: Driver) -> None:
        """Plug in the wanted ports that are not. Conflict, Unavailable, Failed."""
        instance, done = managed.instance, managed.status.ports
        places = await self.ports.places(instance)
        missing = [place for place in places if place.port.index not in done]
        beside = [place for place in places if place.port.index in done]

        def connect(nic: Nic, port: int | None = None) -> Awaitable[None]:
            chosen = [place for place in missing if port in (None, place.port.index)]
            others = [place for place in places if place not in chosen] if port else beside
            return self.ports.plug(managed.tenant, chosen, nic, others)

        with suppress(NotFound):  # it is just ending
            await driver.plug(instance, beside, missing, connect)
        self.statuses.note(managed, ports=[*done, *(place.port.index for place in missing)])

    async def unplug(self, managed: ManagedInstance, driver: Driver) -> None:
        """Unplug the ports that are to be removed, and delete them from the store with their addresses."""
        instance, revision = managed.instance, managed.revision  # a verb may commit another one meanwhile
        gone = [port for port in instance.ports if port.wanted == "removed"]
        if managed.active:
            for port in gone:
                await self._withdraw(managed, driver, port)
            await self.accounts.settle_ports(managed)
        await self.ports.unplug(managed.tenant, gone)
        indices = {port.index for port in gone}
        self.statuses.note(managed, ports=[index for index in managed.status.ports if index not in indices])
        after = msgspec.structs.replace(instance, ports=[port for port in instance.ports if port not in gone])
        own = [each for port in gone for each in port_reservations(port)]
        store = self.context.store
        try:
            revision = await store.transact(
                [Compare(INSTANCES.key(*managed.key), revision)],
                [INSTANCES.put(after, *managed.key), *(each.delete() for each in own)],
            )
        except TransactionConflict:  # the record was changed meanwhile: it is looked at again
            found = await INSTANCES.get(store, *managed.key)
            if found is None or found.value.id != instance.id:
                raise
            managed.instance, managed.revision = found
            return
        self.context.allocators.release(own)
        managed.instance, managed.revision = after, revision

    async def _withdraw(self, managed: ManagedInstance, driver: Driver, port: Port) -> None:
        """Delete a port's device while the instance runs, also if that does not let go of it. Its counters stay."""
        places = await self.ports.places(managed.instance)
        beside = [place for place in places if place.port.index in managed.status.ports]
        with suppress(NotFound):  # it is just ending: then the device goes with its namespace
            try:
                await driver.unplug(managed.instance, port, beside)
            finally:
                await self.ports.withdraw(managed.tenant, port, driver.nic(managed.instance.id), beside)
