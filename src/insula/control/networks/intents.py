"""What tenants want of the fabric: put together from the store and from instances, and applied."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping

from insula.control.context import Context
from insula.control.keys import NETWORKS, TENANTS
from insula.model.errors import InsulaError, NotFound
from insula.model.objects import Instance, Port, Tenant
from insula.network.intent import TenantIntent


class Intents:
    """`instances` are a tenant's on this host, each with whether it runs: then its name resolves. `seen` has the
    revision of the store at which each tenant's intent was built last."""

    def __init__(self, context: Context, instances: Callable[[str], Iterable[tuple[Instance, bool]]]) -> None:
        self.context = context
        self.seen: dict[str, int] = {}
        self._instances = instances

    async def apply(self, tenant: Tenant) -> Mapping[str, InsulaError]:
        """Have the fabric make what the tenant wants now. What can't be made is returned (`Fabric.apply`).

        Raises InsulaError if nothing can be made, NotFound if there is no such tenant any more. It runs to its end even
        if the caller is cancelled.
        """

        async def work() -> Mapping[str, InsulaError]:
            await self.context.prepared(tenant.name)
            async with self.context.locks[tenant.name]:
                intent = await self.build(tenant)
                if intent is None:
                    raise NotFound(f"there is no tenant {tenant.name}", "`insula tenant ls` lists them")
                return await asyncio.to_thread(self.context.fabric.apply, intent)

        return await asyncio.shield(asyncio.ensure_future(work()))

    async def build(self, tenant: Tenant) -> TenantIntent | None:
        """The tenant's intent, None if the tenant was removed. The tenant's lock is held, so that of two intents the
        later one is applied last."""
        store, name = self.context.store, tenant.name
        found = await TENANTS.get(store, name)
        if found is None or found.value.index != tenant.index:
            return None
        snapshot = await store.list(NETWORKS.prefix(name))
        networks = [each.value for each in NETWORKS.sort_out(snapshot.entries)[0]]
        self.seen[name] = snapshot.revision
        instances = list(self._instances(name))
        return TenantIntent(
            tenant=tenant,
            networks=networks,
            ports=[port for instance, _ in instances for port in instance.ports],
            names={i.name: [a for port in i.ports for a in addresses(port)] for i, runs in instances if runs},
            complete=not self.context.unreadable,
        )


def addresses(port: Port) -> list[str]:
    """What an instance's name resolves to."""
    return [port.address, *([port.address6] if port.address6 else [])]
