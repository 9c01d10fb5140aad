"""`Forking`: copies of an instance that runs, which go on from the same moment, each as an instance of its own.

Nothing is committed before the moment is there. Then each copy gets its files, and after that its record, its addresses
and its part of the quota in one transaction. So after a crash each copy is there whole, or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from functools import partial, reduce
from itertools import count

import msgspec

from insula.control.allocation.quotas import add, of_instance, total
from insula.control.allocation.transaction import guard
from insula.control.identities.admission import admit
from insula.control.identities.authority import Authority
from insula.control.instances.admission import Admitted
from insula.control.instances.checks import check_running, check_there
from insula.control.instances.drivers.base import snapshots_of
from insula.control.instances.drivers.snapshots import SnapshotFiles
from insula.control.instances.managed import ManagedInstance
from insula.control.instances.snapshots import Snapshots
from insula.control.instances.verbs import view
from insula.control.keys import INSTANCES
from insula.model import rules
from insula.model.errors import Conflict, InsulaError, Invalid
from insula.model.objects import Instance, InstanceSpec, InstanceStatus, NetworkAttachment, Tenant
from insula.model.snapshots import ForkSpec
from insula.model.views import InstanceView
from insula.store.typed import Found


class Forking:
    def __init__(self, snapshots: Snapshots) -> None:
        self.context = snapshots.context
        self.instances = snapshots.instances
        self.snapshots = snapshots

    async def fork(self, tenant: str, name: str, spec: ForkSpec, *, by: Authority) -> Sequence[InstanceView]:
        """Make copies of an instance that runs, with its memory and files, and start them. Each has a name, addresses
        and an identity of its own before a program in it goes on. Published ports and addresses that were asked for
        stay the instance's own. Conflict, Denied, QuotaExceeded, Failed; then there are none, except that one which
        does not start stays, as after `run`."""
        return await self.snapshots.whole(self._fork(tenant, name, spec, by))

    async def _fork(self, tenant: str, name: str, spec: ForkSpec, by: Authority) -> Sequence[InstanceView]:
        if not 1 <= spec.count <= rules.MAX_FORKS:
            raise Invalid(f"there can't be {spec.count} copies at a time", f"use 1 to {rules.MAX_FORKS}")
        self.context.refuse_if_going_down()
        managed = await self.instances.find(tenant, name)
        files = snapshots_of(self.context.driver(managed.instance), "forks")
        async with self.snapshots.locks[managed.instance.id]:
            check_there(managed)
            check_running(managed)
            admit(by, tenant, managed.instance.spec)
            await self._check_quota(managed, spec.count)
            children = await self._admitted(by, managed, files, spec.count)
        return await self._started(children)

    async def _check_quota(self, managed: ManagedInstance, copies: int) -> None:
        """Raise QuotaExceeded before the instance stands still for nothing."""
        tenant = (await self.instances.tenants.find(managed.instance.tenant)).value
        usage = (await guard(self.context.store, tenant.name)).value
        one = of_instance(_spec(managed.instance, ""), managed.instance.config)
        add(tenant, usage, reduce(total, [one] * copies))

    async def _admitted(
        self, by: Authority, managed: ManagedInstance, files: SnapshotFiles, copies: int
    ) -> Sequence[ManagedInstance]:
        """Commit the copies, which are not started yet; none after an error."""
        instance = managed.instance
        made, taken = await files.take_for_copies(instance)
        admitted: list[Admitted] = []
        try:
            if managed.instance.spec != instance.spec:  # the copies would not be what their spec says
                raise Conflict(f"instance {instance.name} was changed meanwhile", "try again")
            of = Found(managed.instance, managed.revision)
            for name in await self._names(instance, copies):
                place = partial(self._place, files, instance, made)
                admitting = self.instances.controller.admitting
                spec = _spec(instance, name)
                admitted.append(await self.instances.admission.admit_copy(by, spec, of, place, admitting=admitting))
        except BaseException:
            for each in admitted:
                self._take_back(each)
            raise
        finally:
            with contextlib.suppress(OSError):  # the next start of the daemon does it
                await files.remove_copies(instance.id, made)
        recorder = self.instances.controller.recorder
        recorder.record(managed, "forked", copies=copies, stopped=round(taken.stopped, 6))
        return [_managed(each) for each in admitted]

    async def _place(
        self, files: SnapshotFiles, instance: Instance, made: str, tenant: Tenant, draft: Instance
    ) -> None:
        await files.place(instance, made, tenant, draft.id)

    def _take_back(self, admitted: Admitted) -> None:
        """Remove a copy that was committed, and never started."""
        managed = _managed(admitted)
        managed.instance = msgspec.structs.replace(managed.instance, wanted="removed")
        self.instances.controller.create(managed)

    async def _names(self, instance: Instance, copies: int) -> Sequence[str]:
        """The first free ones of NAME-1, NAME-2 and so on."""
        taken = {each.name for each in await INSTANCES.readable(self.context.store, instance.tenant)}
        found: list[str] = []
        for number in count(1):
            if len(found) == copies:
                break
            end = f"-{number}"
            name = instance.name[: rules.MAX_LABEL - len(end)].rstrip("-") + end
            if name not in taken:
                found.append(name)
        return found

    async def _started(self, children: Sequence[ManagedInstance]) -> Sequence[InstanceView]:
        controller = self.instances.controller
        for each in children:
            controller.create(each)
        waits = (controller.converged(each, each.instance.generation) for each in children)
        for result in await asyncio.gather(*waits, return_exceptions=True):
            if isinstance(result, InsulaError):
                raise result
        return [view(each) for each in children]


def _managed(admitted: Admitted) -> ManagedInstance:
    status = InstanceStatus(state="created", starts=admitted.instance.starts)
    return ManagedInstance(admitted.tenant, admitted.instance, status, admitted.revision)


def _spec(instance: Instance, name: str) -> InstanceSpec:
    """The spec of a copy: what is the instance's alone is left out."""
    networks = [NetworkAttachment(network=each.network) for each in instance.spec.networks]
    return msgspec.structs.replace(instance.spec, name=name, hostname=None, networks=networks, published=[])
