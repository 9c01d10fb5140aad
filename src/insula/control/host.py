"""This host: its status, `whois` of a process, the checks of `insula doctor`, verification, and `insula down`."""

from __future__ import annotations

import asyncio
import platform
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from insula import __version__
from insula.control.disk import close_pool, examine_disk
from insula.control.doctor import examine
from insula.control.instances.controller import InstanceController
from insula.control.instances.drivers.container.processes import whois
from insula.control.instances.drivers.uncharged import Uncharged
from insula.control.keys import NETWORKS, TENANTS
from insula.control.networks.controller import NetworkController
from insula.control.tasks import Tasks
from insula.control.verify import Verifier
from insula.model.errors import Failed, InsulaError, Invalid, Unavailable
from insula.model.views import Check, HostStatus, VerifyReport, WhoIs


class Host:
    def __init__(
        self,
        instances: InstanceController,
        networks: NetworkController,
        tasks: Tasks,
        settle: Callable[[], Awaitable[None]],
    ) -> None:
        """`settle` stores what instances have used, before their control groups are removed."""
        self.context = instances.context
        self.instances = instances
        self.networks = networks
        self.managed = instances.managed
        settings = self.context.settings
        self.uncharged = Uncharged(settings.run / "uncharged", enabled=settings.ebpf_budgets)
        self.verifier = Verifier(self.context, networks.intents, self.managed, tasks)
        self.started = time.time()
        self._settle = settle

    async def status(self) -> HostStatus:
        store = self.context.store
        tenants, networks = await asyncio.gather(store.list(TENANTS.prefix_all()), store.list(NETWORKS.prefix_all()))
        try:
            drift = await asyncio.to_thread(self.context.fabric.host_drift)
        except Unavailable as error:  # everything is being taken down
            drift = [error.message]
        return HostStatus(
            version=__version__,
            hostname=platform.node(),
            kernel=platform.release(),
            started=self.started,
            revision=networks.revision,
            tenants=len(tenants.entries),
            networks=len(networks.entries),
            instances=dict(Counter(m.status.state for m in self.managed.of(None))),
            reconciling=sum(not m.reconciled.is_set() for m in self.managed.of(None)),
            problems=[*self._problems(), *drift],
        )

    async def whois(self, pid: int) -> WhoIs:
        """The tenant and instance that a host process belongs to. Invalid; NotFound if there is no such process."""
        if not 0 < pid < 1 << 31:
            raise Invalid(f"{pid} is not a PID", "use a PID of the host, as ps(1) lists them")
        found = await asyncio.to_thread(whois, pid, self.context.settings.prefix)
        if found.tenant is None:
            return found
        members = self.managed.of(found.tenant)
        name = next((m.instance.name for m in members if m.instance.id == found.id), None)
        return msgspec.structs.replace(found, instance=name)

    async def doctor(self) -> Sequence[Check]:
        found = await asyncio.to_thread(examine, self.context.settings)
        disk = await asyncio.to_thread(examine_disk, self.context.disk)
        found = [*found, disk, self.uncharged.check()]
        return [*found, *(Check(name="problem", state="degraded", detail=problem) for problem in self._problems())]

    def _problems(self) -> Sequence[str]:
        """The problems of this host, one line of text each."""
        own = [f"monitor: {d.trouble}" for d in self.context.drivers.values() if d.trouble]
        return [*own, *(f"{name}: {what}" for name, what in sorted(self.context.problems.items()))]

    async def verify(self) -> VerifyReport:
        return await self.verifier.run()

    async def repair(self) -> VerifyReport:
        return await self.verifier.repair()

    async def down(self) -> None:
        """End all instances, and remove every namespace, mount, control group, device and rule of Insula from the host.

        The desired state stays as it is: the next start of the daemon starts instances as their restart policies say.
        This daemon starts nothing any more. Failed says what could not be removed.
        """
        self.context.going_down.set()
        await self.networks.stop()
        await self.instances.stop_all()
        await self._settle()
        try:
            for driver in self.context.drivers.values():
                await driver.take_down()
            await asyncio.to_thread(self.context.fabric.teardown)
            await asyncio.to_thread(self.context.groups.take_down)
            await asyncio.to_thread(self.uncharged.restore)
            await asyncio.to_thread(close_pool, self.context.settings)
        except InsulaError:
            raise
        except OSError as error:
            raise Failed(f"not everything could be taken down: {error}", "try again, and see insulad's log") from error
