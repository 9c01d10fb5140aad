"""`Instances`: the verbs. Each checks, commits the desired state in one transaction, and waits until it is observed.

Verbs don't act on the host. The controller of the instance's host does, in this daemon or in another one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from signal import SIGKILL
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from insula.control.identities.admission import admit
from insula.control.identities.authority import Authority
from insula.control.instances import remote
from insula.control.instances.admission import Admission, respecify
from insula.control.instances.attach_session import AttachSession
from insula.control.instances.checks import (
    Known,
    as_it_is,
    check_boots,
    check_running,
    check_there,
    not_running,
    still_active,
)
from insula.control.instances.connecting import connect, with_network, without_port
from insula.control.instances.controller import InstanceController
from insula.control.instances.damaged import Damaged
from insula.control.instances.drivers.base import require
from insula.control.instances.io import InstanceIo
from insula.control.instances.managed import READY, ManagedInstance
from insula.control.instances.publishing import respecify_published
from insula.control.instances.renaming import rename
from insula.control.instances.sharing import pid_owner
from insula.control.instances.specs import check, cli_command, stop_signal
from insula.control.instances.statuses import error_of
from insula.control.instances.updating import update
from insula.control.keys import INSTANCES, STATUS
from insula.control.networks.enforcement import Enforcement
from insula.control.tasks import Tasks
from insula.control.tenants import Tenants
from insula.model.errors import Conflict, Failed, InsulaError, NotFound, Unavailable
from insula.model.objects import (
    ConsoleSize,
    Exit,
    Instance,
    InstanceSpec,
    InstanceStatus,
    NetworkAttachment,
    RestartPolicy,
    Tenant,
)
from insula.model.units import check_label, parse_signal
from insula.model.views import InstanceView, PublishedPatch, ResourcesPatch
from insula.store.protocol import TransactionConflict
from insula.store.typed import Found

_ATTEMPTS = 20  # at a transaction, while the same instance is changed by others

Changes = dict[str, Any]


class AttachedRun(NamedTuple):
    """An instance that is being started: its name, its streams, and the end of its start, with its error."""

    name: str
    streams: AbstractAsyncContextManager[AttachSession]
    started: asyncio.Task[InstanceStatus]


class Instances(InstanceIo):
    def __init__(
        self,
        tenants: Tenants,
        admission: Admission,
        controller: InstanceController,
        tasks: Tasks,
        enforcement: Enforcement,
    ) -> None:
        super().__init__(tenants, controller, tasks)
        self.enforcement = enforcement
        self.admission = admission
        self.damaged = Damaged(controller)

    # -- reading ---------------------------------------------------------------------------------------------------

    async def get(self, tenant: str, name: str) -> InstanceView:
        return await self._view(await self._known(tenant, name))

    async def list(self, tenant: str | None = None) -> list[InstanceView]:
        """The instances of the tenant, or of all tenants for None, on every host."""
        if tenant is not None:
            await self.tenants.find(tenant)
        own = (view(managed) for managed in self.managed.of(tenant))
        found = [*own] if self.managed.complete else [*await self._all(tenant)]
        return [*found, *self.damaged.views(tenant)] if self.context.unreadable else found

    async def _all(self, tenant: str | None) -> Sequence[InstanceView]:
        """The instances in the store. Records are large, so `list` calls this only if other daemons commit to the store
        (`ManagedInstances.complete`)."""
        snapshot = await self.context.store.list(INSTANCES.prefix(tenant) if tenant else INSTANCES.prefix_all())
        views, others = {}, []
        for entry in snapshot.entries:
            key = INSTANCES.parts(entry.key)
            if managed := self.managed.find(*key):
                views[key] = view(managed)
            else:
                others.append(entry)
        for instance, _ in INSTANCES.sort_out(others)[0]:  # of other hosts, or about to be managed here
            if instance.host != self.context.host:
                status = await self._stored_status(instance)
                views[instance.tenant, instance.name] = remote.view(instance, status)
        return [each for _, each in sorted(views.items())]

    async def _known(self, tenant: str, name: str, *, again: bool = False) -> Known:
        """The instance as this daemon knows it; with `again` its record is read from the store. NotFound."""
        try:
            managed = await self.find(tenant, name)
        except Unavailable:
            found = await INSTANCES.get(self.context.store, tenant, name)
            if found is None or found.value.host == self.context.host:
                raise
            return Known(found.value, found.revision, await self._stored_status(found.value))
        if again and (found := await INSTANCES.get(self.context.store, tenant, name)):
            self.controller.committed(found.value, found.revision)
        return Known(managed.instance, managed.revision, managed.status)

    async def _stored_status(self, instance: Instance) -> InstanceStatus:
        with contextlib.suppress(Failed):  # damaged; the daemon of its host writes it anew
            if found := await STATUS.get(self.context.store, instance.tenant, instance.name):
                return found.value
        return InstanceStatus(state="created")

    async def _view(self, known: Known) -> InstanceView:
        if managed := self.managed.find(known.instance.tenant, known.instance.name):
            return view(managed)
        return remote.view(known.instance, known.status)

    # -- committing and waiting --------------------------------------------------------------------------------------

    async def commit(
        self, tenant: str, name: str, attempt: Callable[[Known], Awaitable[Found[Instance] | None]]
    ) -> Found[Instance] | None:
        """Call `attempt`, which commits a change of the instance or returns None if none is needed. Retry while the
        instance is changed by others meanwhile. Conflict."""
        for number in range(_ATTEMPTS):
            known = await self._known(tenant, name, again=number > 0)
            check_there(known)
            try:
                found = await attempt(known)
            except TransactionConflict:
                continue
            if found:
                self.controller.committed(*found)
            return found
        raise Conflict(f"instance {name} was changed at the same time", "try again")

    async def converged(self, found: Found[Instance]) -> InstanceView:
        """Wait until the committed state is observed, and return the instance. Raises why it failed."""
        instance = found.value
        if instance.host != self.context.host:
            status = await remote.converged(self.context.store, *found)
            return remote.view(instance, status or InstanceStatus(state="exited"))
        managed = self.managed.find(instance.tenant, instance.name)
        if managed is None or managed.instance.id != instance.id:  # it is gone already
            status = InstanceStatus(state="exited", exit=self.managed.last_exit(instance.tenant, instance.name))
            return InstanceView(instance=instance, status=status)
        await self.controller.converged(managed, instance.generation)
        return view(managed)

    async def _make(self, tenant: str, name: str, wanted: Callable[[Known], Changes | None]) -> InstanceView:
        """Commit the changes that `wanted` returns, and wait until they are observed. None changes nothing."""

        async def attempt(known: Known) -> Found[Instance] | None:
            changes = wanted(known)
            if changes is None:
                return None
            generation = known.instance.generation + 1
            instance = msgspec.structs.replace(known.instance, generation=generation, **changes)
            put = INSTANCES.put(instance, tenant, name)
            return Found(instance, await self.context.store.put(put.key, put.value, expect=known.revision))

        return await self._changed(tenant, name, attempt)

    async def _changed(
        self, tenant: str, name: str, attempt: Callable[[Known], Awaitable[Found[Instance] | None]]
    ) -> InstanceView:
        """Commit by `attempt`, and wait until that is observed."""
        if found := await self.commit(tenant, name, attempt):
            return await self.converged(found)
        return await self.get(tenant, name)

    # -- verbs -----------------------------------------------------------------------------------------------------

    async def run(self, tenant: str, spec: InstanceSpec, *, by: Authority, start: bool = True) -> InstanceView:
        """Create an instance that `by` asks for and start it, unless `start` is False.

        After an error there is no instance. Only after a failed start it stays, with the state "failed", unless it is
        to be removed when it ends.
        """
        return await self._whole(self._run(tenant, spec, by, start))

    async def _run(self, tenant: str, spec: InstanceSpec, by: Authority, start: bool) -> InstanceView:
        managed = await self._admitted(by, tenant, spec, start=start)
        self.controller.create(managed)
        await self.controller.converged(managed, managed.instance.generation)
        if spec.published:
            await self._reachable(tenant)
        return view(managed)

    async def run_attached(
        self, tenant: str, spec: InstanceSpec, console: ConsoleSize | None = None, *, by: Authority
    ) -> AttachedRun:
        """Create an instance, start it, and attach to it from its start. `console` is the size of its terminal.

        It returns when the instance is created, and raises what prevents that.
        """
        return await self._whole(self._run_attached(tenant, spec, console, by))

    async def _run_attached(
        self, tenant: str, spec: InstanceSpec, console: ConsoleSize | None, by: Authority
    ) -> AttachedRun:
        driver = require(self.context.driver_for(spec), "attach")
        managed = await self._admitted(by, tenant, spec, start=True)
        managed.console = console
        attachment = self._attachment(managed, driver, stdin=spec.stdin)
        managed.waiting.add(attachment)
        self.controller.create(managed)
        started = self._tasks.spawn(self.controller.converged(managed, managed.instance.generation))
        return AttachedRun(managed.instance.name, self._attached(managed, attachment), started)

    async def _admitted(self, by: Authority, tenant: str, spec: InstanceSpec, *, start: bool) -> ManagedInstance:
        """Commit a new instance, which nothing is done about before `InstanceController.create`."""
        self.context.refuse_if_going_down()
        if start and spec.options.pid_of:
            await self.tenants.find(tenant)
            pid_owner(self.managed, tenant, spec)  # checked first, so that a wrong name leaves no failed instance
        admitted = await self.admission.admit(by, tenant, spec, start=start, admitting=self.controller.admitting)
        status = InstanceStatus(state="created", starts=admitted.instance.starts)
        return ManagedInstance(admitted.tenant, admitted.instance, status, admitted.revision)

    async def start(
        self, tenant: str, name: str, console: ConsoleSize | None = None, *, by: Authority, cold: bool = False
    ) -> InstanceView:
        """Start an instance; one that runs already is left alone. `console` is the size of its terminal. A machine is
        booted if it is to be `cold`, also where it would go on from a snapshot."""
        return await self._whole(self._start(tenant, name, console, by, cold))

    async def _start(
        self, tenant: str, name: str, console: ConsoleSize | None, by: Authority, cold: bool
    ) -> InstanceView:
        self.context.refuse_if_going_down()

        def wanted(known: Known) -> Changes | None:
            if cold:
                check_boots(known.instance)
            if known.status.state == "paused":
                check_running(known)
            if known.status.state in ("starting", "running"):
                return None
            admit(by, tenant, known.instance.spec)
            if managed := self.managed.find(tenant, name):
                managed.console = console
            starts = known.instance.starts + 1
            cold_start = {"cold_start": starts} if cold else {}
            return {"wanted": "running", "starts": starts, "stop_timeout": None, **cold_start}

        found = await self._make(tenant, name, wanted)
        if found.status.state == "starting" and (managed := self.managed.find(tenant, name)):  # somebody was faster
            await self.controller.converged(managed, found.instance.generation)
            return view(managed)
        return found

    async def stop(self, tenant: str, name: str, timeout: float | None = None) -> InstanceView:
        """Stop an instance: send its stop signal, then SIGKILL after `timeout` seconds (None: the spec's)."""
        return await self._whole(self._make(tenant, name, lambda known: {"wanted": "stopped", "stop_timeout": timeout}))

    async def restart(self, tenant: str, name: str, timeout: float | None = None, *, by: Authority) -> InstanceView:
        """Stop an instance as `stop` does if it runs, then start it."""
        self.context.refuse_if_going_down()

        def wanted(known: Known) -> Changes:
            admit(by, tenant, known.instance.spec)
            if known.instance.spec.remove and known.active:
                raise Conflict(f"instance {name} is removed when it ends", "it can't be restarted")
            return {"wanted": "running", "starts": known.instance.starts + 1, "stop_timeout": timeout}

        return await self._whole(self._make(tenant, name, wanted))

    async def kill(self, tenant: str, name: str, signal: str = "SIGKILL") -> None:
        """Send a signal to PID 1. Conflict if the instance doesn't run."""
        number = parse_signal(signal)
        managed = await self._started(tenant, name)
        if managed.status.state not in ("starting", "running", "paused", "stopping"):
            raise not_running(managed)
        try:
            self._driver(managed).signal(managed.instance.id, number)
        except NotFound:
            raise not_running(managed) from None
        if managed.status.state == "paused" and number in (SIGKILL, stop_signal(managed.instance)):
            await self._whole(self._wake(tenant, name))  # other signals are delivered when it is resumed

    async def _wake(self, tenant: str, name: str) -> None:
        """Resume a paused instance; nothing happens if it is not paused any more."""

        def wanted(known: Known) -> Changes | None:
            return {"wanted": "running"} if known.status.state == "paused" else None

        await self._make(tenant, name, wanted)

    async def remove(self, tenant: str, name: str, *, force: bool = False) -> None:
        """Remove an instance. Conflict while it runs. `force` kills it, and removes one whose record is damaged."""
        if force and (check_label("tenant", tenant), check_label("instance", name)) in self.damaged.names(tenant):
            owner = (await self.tenants.find(tenant)).value
            await self._whole(self._remove_damaged(owner, name))
            return

        def wanted(known: Known) -> Changes:
            if known.active and not force:
                raise still_active(known)
            return {"wanted": "removed"}

        await self._whole(self._make(tenant, name, wanted))

    async def _remove_damaged(self, owner: Tenant, name: str) -> None:
        await self.damaged.remove(owner, name)
        if not self.context.unreadable:
            await self.admission.images.collect()

    async def pause(self, tenant: str, name: str) -> InstanceView:
        """Freeze all processes of an instance, until `unpause`. Conflict unless it runs."""

        def wanted(known: Known) -> Changes:
            if known.status.state == "paused":
                hint = f"{cli_command(tenant, f'unpause {name}')} resumes it"
                raise Conflict(f"instance {name} is paused already", hint)
            check_running(known)
            return {"wanted": "paused"}

        if managed := self.managed.find(tenant, name):
            require(self._driver(managed), "pause")
        await self._settle_start(tenant, name)
        found = await self._whole(self._make(tenant, name, wanted))
        if found.status.state != "paused":  # it ended meanwhile
            raise not_running(Known(found.instance, 0, found.status))
        return found

    async def unpause(self, tenant: str, name: str) -> InstanceView:
        """Resume the processes of an instance. Conflict unless it is paused."""

        def wanted(known: Known) -> Changes:
            if known.status.state != "paused":
                raise Conflict(
                    f"instance {name} is not paused ({known.status.state})", "`insula ps -a` shows its state"
                )
            return {"wanted": "running"}

        await self._settle_start(tenant, name)
        return await self._whole(self._make(tenant, name, wanted))

    async def _settle_start(self, tenant: str, name: str) -> None:
        """Return when the instance is not starting."""
        if (managed := self.managed.find(tenant, name)) and managed.status.state == "starting":
            async with managed.lock:
                pass
            await managed.until_ready(READY)

    async def rename(self, tenant: str, name: str, to: str) -> InstanceView:
        """Rename an instance. Invalid, Conflict; after an error nothing has changed."""
        return await self._whole(self._rename(tenant, name, to))

    async def _rename(self, tenant: str, name: str, to: str) -> InstanceView:
        found = await self.commit(tenant, name, partial(rename, self.controller, name=to))
        assert found
        return await self.converged(found)

    async def update(
        self, tenant: str, name: str, patch: ResourcesPatch, keep: Mapping[str, str] = MappingProxyType({})
    ) -> InstanceView:
        """Change limits and labels of an instance, at once if it runs: the policies that select it by its labels are in
        force when this returns. It must have the labels `keep` afterwards (Denied). Invalid, QuotaExceeded, Failed;
        after an error nothing has changed."""
        return await self._whole(update(self, tenant, name, patch, keep))

    async def publish(self, tenant: str, name: str, patch: PublishedPatch) -> InstanceView:
        """Publish more ports of an instance, and withdraw others, at once. Invalid, NotFound, Conflict; after an error
        nothing has changed."""

        async def attempt(known: Known) -> Found[Instance] | None:
            return await respecify_published(self.admission, known, patch)

        found = await self._whole(self._changed(tenant, name, attempt))
        await self._reachable(tenant)
        return found

    async def _reachable(self, tenant: str) -> None:
        """Return when the tenant's published ports are installed. A failure is recorded as a problem of this host."""
        with contextlib.suppress(NotFound):
            await self.controller.lifecycle.ports.networks.converged(tenant)

    async def plug(self, tenant: str, name: str, attachment: NetworkAttachment) -> InstanceView:
        """Connect an instance to one more network, at once if it runs. Invalid, NotFound, Conflict, QuotaExceeded;
        after an error nothing has changed."""
        return await self.connect(tenant, name, partial(with_network, attachment=attachment))

    async def unplug(self, tenant: str, name: str, which: str) -> InstanceView:
        """Disconnect an instance from a network, named by that or by the interface. NotFound."""
        check_label("port", which)
        return await self.connect(tenant, name, partial(without_port, which=which))

    async def connect(
        self, tenant: str, name: str, wanted: Callable[[Instance], Sequence[NetworkAttachment]]
    ) -> InstanceView:
        """Connect an instance to the networks that `wanted` returns, and to no others."""
        return await self._whole(self._connect(tenant, name, wanted))

    async def _connect(
        self, tenant: str, name: str, wanted: Callable[[Instance], Sequence[NetworkAttachment]]
    ) -> InstanceView:
        before: Sequence[NetworkAttachment] | None = None

        async def attempt(known: Known) -> Found[Instance] | None:
            nonlocal before
            before = known.instance.spec.networks
            return await connect(self.admission, known, wanted(known.instance))

        async def undo(known: Known) -> Found[Instance] | None:
            rest = [each for each in known.instance.spec.networks if before is None or each in before]
            return await connect(self.admission, known, rest)

        try:
            return await self._changed(tenant, name, attempt)
        except InsulaError:  # such as a network that is full
            with contextlib.suppress(InsulaError):
                if taken_back := await self.commit(tenant, name, undo):
                    await self.converged(taken_back)
            raise

    async def reconfigure(
        self,
        tenant: str,
        name: str,
        *,
        by: Authority,
        labels: dict[str, str],
        restart: RestartPolicy,
        stop_timeout: float,
    ) -> InstanceView:
        """Change what is looked at only when it is needed, so that a running instance goes on. Invalid, QuotaExceeded;
        Denied as for a start, since its restart policy may start it."""

        async def attempt(known: Known) -> Found[Instance] | None:
            before = known.instance.spec
            spec = check(msgspec.structs.replace(before, labels=labels, restart=restart, stop_timeout=stop_timeout))
            admit(by, tenant, spec)
            return None if spec == before else await respecify(self.context, as_it_is(known), known.revision, spec)

        async def changed() -> InstanceView:
            view = await self._changed(tenant, name, attempt)
            await self.enforcement.enforced(tenant)
            return view

        return await self._whole(changed())

    async def wait(self, tenant: str, name: str) -> Exit:
        """Wait until PID 1 has ended, and return its exit; also for an instance that was removed when it ended."""
        try:
            known = await self._known(tenant, name)
        except NotFound:
            if ended := self.managed.last_exit(tenant, name):
                return ended
            raise
        managed = self.managed.find(tenant, name)
        status = known.status if managed else await remote.ended(self.context.store, known.instance)
        if status.state == "exited" and status.exit:
            return status.exit
        if status.state == "failed" or managed is None:
            raise error_of(status) if status.error else Failed(f"instance {name} did not start")
        return await asyncio.shield(managed.ended)


def view(managed: ManagedInstance) -> InstanceView:
    return InstanceView(
        instance=managed.instance,
        status=managed.status,
        restarting=managed.restarting,
        health=managed.monitor.health if managed.monitor else None,
        responsive=managed.answers,
        reconciled=managed.reconciled.is_set(),
    )
