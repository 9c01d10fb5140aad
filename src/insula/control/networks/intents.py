"""What tenants want of the fabric: put together from the store and from instances."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from insula.control.context import Context
from insula.control.keys import NETWORKS, TENANTS
from insula.model.objects import Instance, Port
from insula.network.intent import TenantIntent


class Intents:
    """`instances` are a tenant's on this host, each with whether it runs: then its name resolves. `seen` has the
    revision of the store at which each tenant's intent was built last."""

    def __init__(self, context: Context, instances: Callable[[str], Iterable[tuple[Instance, bool]]]) -> None:
        self.context = context
        self.seen: dict[str, int] = {}
        self._instances = instances

    async def build(self, name: str) -> TenantIntent | None:
        """The tenant's intent, None if there is no such tenant. The tenant's lock is held, so that of two intents the
        later one is applied last."""
        store = self.context.store
        snapshot = await store.list(NETWORKS.prefix(name))
        if (found := await TENANTS.get(store, name)) is None:
            self.seen.pop(name, None)
            return None
        self.seen[name] = snapshot.revision  # what was read after that may be newer
        instances = list(self._instances(name))
        return TenantIntent(
            tenant=found.value,
            networks=[each.value for each in NETWORKS.sort_out(snapshot.entries)[0]],
            ports=[port for instance, _ in instances for port in instance.ports],
            names={i.name: [a for port in i.ports for a in addresses(port)] for i, runs in instances if runs},
            complete=not self.context.unreadable,
        )


def addresses(port: Port) -> list[str]:
    """What an instance's name resolves to."""
    return [port.address, *([port.address6] if port.address6 else [])]
