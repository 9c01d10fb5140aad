"""`insula verify`: measures whether tenants are isolated. `insula.network.verify` compares; this module gives it the
desired state from the store and the network namespaces of running instances.

The locks of all tenants are held meanwhile, so that no network changes. Instances may still start and end. If one did
and the report has findings, the measurement is repeated.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress

from insula.control.context import Context
from insula.control.instances.managed import ManagedInstances
from insula.control.keys import NETWORKS, ROUTERS, TENANTS
from insula.control.networks.intents import Intents
from insula.control.tasks import Tasks
from insula.model.errors import NotFound
from insula.model.views import VerifyReport
from insula.network.fabric import NetnsNic
from insula.network.proof import Prover
from insula.network.verify import verify

_ATTEMPTS = 5


class Verifier:
    def __init__(self, context: Context, intents: Intents, managed: ManagedInstances, tasks: Tasks) -> None:
        self.context = context
        self.intents = intents
        self.prover = Prover(context.fabric)
        self.managed = managed
        self._tasks = tasks
        self._one = asyncio.Lock()  # two runs at a time would report each other's probes

    async def run(self) -> VerifyReport:
        """The report on all instances that run now. It takes about a second."""
        return await asyncio.shield(self._tasks.spawn(self._run()))

    async def _run(self) -> VerifyReport:
        async with self._one:
            for _ in range(_ATTEMPTS):
                before = self._lives()
                report = await self._measure()
                if report.passed or before == self._lives():
                    break
            return report

    def _lives(self) -> list[tuple[str, str, int | None]]:
        return [(m.instance.id, m.status.state, m.status.pid) for m in self.managed.of(None)]

    async def _measure(self) -> VerifyReport:
        store, context = self.context.store, self.context
        async with AsyncExitStack() as held:
            tenants, networks, routers = await asyncio.gather(
                TENANTS.readable(store), NETWORKS.readable(store), ROUTERS.readable(store)
            )
            for tenant in tenants:
                await context.prepared(tenant.name)
            for tenant in tenants:  # in name order: no deadlock
                await held.enter_async_context(context.locks[tenant.name])
            ports = [port for m in self.managed.of(None) for port in m.instance.plugged]
            netns = self._namespaces(held)
            intents = [intent for tenant in tenants if (intent := await self.intents.build(tenant.name))]
            return await asyncio.to_thread(
                verify, context.fabric, tenants, networks, ports, netns, routers, intents, self.prover
            )

    def _namespaces(self, held: AsyncExitStack) -> dict[int, int]:
        """A descriptor of each running instance's network namespace, by the indices of its ports."""
        found: dict[int, int] = {}
        for managed in self.managed.of(None):
            ports = managed.instance.plugged
            if ports and managed.status.state in ("running", "paused", "stopping"):
                with suppress(NotFound):  # it has just ended
                    nic = self.context.driver(managed.instance).nic(managed.instance.id)
                    held.callback(nic.close)
                    if isinstance(nic, NetnsNic):
                        found |= {port.index: nic.fd for port in ports}
        return found
