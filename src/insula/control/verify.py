"""`insula verify`: measures whether tenants are isolated. `insula.network.proof` compares; this module gives it the
desired state from the store and the network namespaces of running instances.

The locks of all tenants are held meanwhile, so that no network changes. Instances may still start and end. If one did
and the report has findings, the measurement is repeated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from contextlib import AsyncExitStack, suppress

import msgspec

from insula.control.context import Context
from insula.control.instances.managed import ManagedInstances
from insula.control.keys import NETWORKS, ROUTERS, TENANTS
from insula.control.networks.intents import Intents
from insula.control.tasks import Tasks
from insula.model.errors import NotFound
from insula.model.views import VerifyReport
from insula.network.fabric import DeviceNic, NetnsNic, TapNic
from insula.network.intent import TenantIntent
from insula.network.proof.prover import Prover
from insula.network.proof.verify import verify

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

    async def prove(self, tenant: str) -> Sequence[str]:
        """Return what the proof of a tenant finds, and the differences of what is installed, as text. No packets are
        sent. The tenant's lock is held while it is read."""
        return await asyncio.shield(self._tasks.spawn(self._prove(tenant)))

    async def _prove(self, tenant: str) -> Sequence[str]:
        await self.context.prepared(tenant)
        async with self._one, AsyncExitStack() as held:
            await held.enter_async_context(self.context.locks[tenant])
            netns, taps = self._nics(held)
            if intent := await self.intents.build(tenant):
                return await asyncio.to_thread(self._of_tenant, intent, {*netns, *taps})
        return ()

    async def prove_host(self) -> Sequence[str]:
        """Return what the proof of the host's rules between tenants finds, as text. No tenant's lock is held, so a
        finding may be a change that was half made; only what is found twice is returned."""
        return await asyncio.shield(self._tasks.spawn(self._prove_host()))

    async def _prove_host(self) -> Sequence[str]:
        async with self._one:
            found = await self._between()
            return [text for text in await self._between() if text in found] if found else ()

    async def _between(self) -> Sequence[str]:
        tenants = await TENANTS.readable(self.context.store)
        intents = [intent for tenant in tenants if (intent := await self.intents.build(tenant.name))]
        return await asyncio.to_thread(self._of_host, intents)

    def _of_tenant(self, intent: TenantIntent, running: Collection[int]) -> list[str]:
        installed = self.context.fabric.installed(intent.tenant)
        drift = [f"{intent.tenant.name}: {text}" for text in installed.drift]
        if not installed.namespace:
            return drift
        return [each.text for each in self.prover.tenant(intent, running).findings] + drift

    def _of_host(self, intents: Sequence[TenantIntent]) -> list[str]:
        proof = self.prover.between([intent.tenant for intent in intents], intents)
        return [each.text for each in proof.findings] + [f"host: {text}" for text in self.context.fabric.host_drift()]

    async def repair(self) -> VerifyReport:
        """Verify; have the tenants with findings, and the host's rules, installed again; and verify once more. What is
        right already is not touched, so no connection is cut that should be there."""
        return await asyncio.shield(self._tasks.spawn(self._repair()))

    async def _repair(self) -> VerifyReport:
        before = await self._run()
        if before.passed:
            return before
        concerned = _concerned(before)
        done = []
        if host := await asyncio.to_thread(self.context.fabric.repair_host):
            done += [f"host: {text}" for text in host]
        for tenant in await TENANTS.readable(self.context.store):
            if tenant.name in concerned or "host" in concerned:
                await self.context.prepared(tenant.name)
                async with self.context.locks[tenant.name]:
                    if intent := await self.intents.build(tenant.name):
                        errors = await asyncio.to_thread(self.context.fabric.apply, intent)
                        failed = [f"{part}: {error.message}" for part, error in errors.items()]
                        done.append(f"{tenant.name}: " + ("; ".join(failed) or "installed again"))
        return msgspec.structs.replace(await self._run(), repaired=done)

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
            netns, taps = self._nics(held)
            intents = [intent for tenant in tenants if (intent := await self.intents.build(tenant.name))]
            return await asyncio.to_thread(
                verify, context.fabric, tenants, networks, ports, netns, routers, intents, self.prover, taps
            )

    def _nics(self, held: AsyncExitStack) -> tuple[dict[int, int], set[int]]:
        """A descriptor of each running instance's network namespace, by the indices of its ports; and the indices of
        ports that are devices of virtual machines."""
        found: dict[int, int] = {}
        taps: set[int] = set()
        for managed in self.managed.of(None):
            ports = managed.instance.plugged
            if ports and managed.status.state in ("starting", "running", "paused", "stopping"):
                with suppress(NotFound):  # it has just ended
                    nic = self.context.driver(managed.instance).nic(managed.instance.id)
                    held.callback(nic.close)
                    if isinstance(nic, NetnsNic):
                        found |= {port.index: nic.fd for port in ports}
                    elif isinstance(nic, TapNic | DeviceNic):
                        taps |= {port.index for port in ports}
        return found, taps


def _concerned(report: VerifyReport) -> set[str]:
    """Return the tenants that a report finds something about; "host" is among them if the host is."""
    found = {each.tenant for each in report.findings} | {text.partition(":")[0] for text in report.drift}
    for cell in report.matrix:
        if not cell.ok or cell.probed is None:
            found |= {each.partition("/")[0] for each in (cell.source, cell.target)}
    return found
