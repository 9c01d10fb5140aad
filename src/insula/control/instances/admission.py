"""Admission of instances: checks, quota and addresses, committed in one transaction; and their deletion.

Nothing is started here. When `admit` returns, the instance owns its name, its addresses and its part of the quota.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import chain, count
from typing import NamedTuple

import msgspec

from insula.control.accounting.accounts import Accounts
from insula.control.accounting.ledger import ledger_with
from insula.control.allocation.quotas import add, change, exchange, of_instance, of_snapshots, subtract
from insula.control.allocation.transaction import Proposal, allocate, guard, guarded, turn
from insula.control.context import Context
from insula.control.disk import check_room, choose_project, with_disk_defaults
from insula.control.identities.admission import admit
from insula.control.identities.authority import Authority
from insula.control.images import Images
from insula.control.instances.cdroms import inserted
from insula.control.instances.specs import check, check_networks, make_name
from insula.control.keys import (
    ACCOUNTS,
    EVENTS,
    FLOATING_IPS,
    IMAGES,
    INSTANCES,
    NETWORKS,
    SHARED,
    SNAPSHOTS,
    STATUS,
    TENANTS,
    USAGE,
)
from insula.control.networks.external import ClaimPlan, External, claims_of, owner_of, released
from insula.control.networks.floating_ips import detached
from insula.control.networks.ports import Ports, port_reservations
from insula.control.networks.verbs import Networks
from insula.control.tenants import Tenants
from insula.model.errors import Conflict, Invalid, NotFound
from insula.model.external import ExternalClaim
from insula.model.objects import (
    Image,
    Instance,
    InstanceSpec,
    MachineOptions,
    Network,
    NetworkAttachment,
    OverlayRoot,
    Root,
    Tenant,
)
from insula.model.views import Usage
from insula.store.protocol import Compare, Delete
from insula.store.typed import Found

_NO_CLAIMS = ClaimPlan()
_ID = re.compile("[0-9a-f]{32}")


class Admitted(NamedTuple):
    """A committed instance and the revision of its entry."""

    tenant: Tenant
    instance: Instance
    revision: int


class Admission:
    def __init__(
        self,
        context: Context,
        tenants: Tenants,
        networks: Networks,
        images: Images,
        ports: Ports,
        accounts: Accounts,
    ) -> None:
        self.context = context
        self.tenants = tenants
        self.networks = networks
        self.images = images
        self.ports = ports
        self.accounts = accounts
        self.external = External(context)

    async def admit(
        self, by: Authority, tenant: str, spec: InstanceSpec, *, start: bool, admitting: set[str]
    ) -> Admitted:
        """Commit a new instance that `by` asks for. Invalid, Denied, NotFound, Conflict, QuotaExceeded; after an error
        nothing has changed.

        Its id is added to `admitting` before the commit, so that the controller ignores the store's event of it.
        """
        spec, owner, images, networks = await self._checked(by, tenant, spec)
        draft = self._draft(tenant, spec, images, self.context.driver_for(spec).reserve(tenant), start=start)
        return await self._validated(owner, images, networks, draft, admitting)

    async def _validated(
        self,
        owner: Found[Tenant],
        images: Sequence[Found[Image]],
        networks: Sequence[Found[Network]],
        draft: Instance,
        admitting: set[str],
    ) -> Admitted:
        """Commit a draft that this host can run."""
        await self.context.driver(draft).validate(owner.value, draft)
        there = [IMAGES.unchanged(image, image.value.tenant or SHARED, image.value.name) for image in images]
        admitting.add(draft.id)
        try:
            async with turn(self.context.store, draft.tenant):
                made = await self._commit(owner, networks, there, draft)
        except BaseException:
            admitting.discard(draft.id)
            raise
        return Admitted(owner.value, made.value, made.revision)

    async def admit_copy(
        self,
        by: Authority,
        spec: InstanceSpec,
        of: Found[Instance],
        place: Callable[[Tenant, Instance], Awaitable[None]],
        *,
        admitting: set[str],
    ) -> Admitted:
        """Commit a new instance with the image of another one of the tenant, as `admit` does, after `place` has put the
        files there that it begins with. After an error these are gone as well."""
        tenant = of.value.tenant
        spec, owner, networks = await self._checked_spec(by, tenant, spec)
        driver = self.context.driver(of.value)
        new = {"name": spec.name, "id": driver.reserve(tenant), "spec": spec, "ports": [], "project_id": None}
        begun = {"wanted": "running", "stop_timeout": None, "generation": 1, "starts": 1, "cold_start": None}
        draft = msgspec.structs.replace(of.value, **new, **begun, created=time.time())
        await driver.validate(owner.value, draft)
        admitting.add(draft.id)
        try:
            await place(owner.value, draft)
            async with turn(self.context.store, tenant):
                there = [INSTANCES.unchanged(of, tenant, of.value.name)]
                made = await self._commit(owner, networks, there, draft)
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(driver.remove_directory(draft.id)))
            admitting.discard(draft.id)
            raise
        return Admitted(owner.value, made.value, made.revision)

    async def admit_arrival(
        self,
        by: Authority,
        tenant: str,
        spec: InstanceSpec,
        new_id: str,
        digest: str,
        ticket: str,
        *,
        admitting: set[str],
    ) -> Admitted:
        """Commit an instance that comes from another host with its ID, as `admit` does, if there is the same image."""
        spec, owner, images, networks = await self._checked(by, tenant, spec)
        if images[0].value.digest != digest:
            what = f"image {spec.image} is another one on the other host"
            raise Conflict(what, "pull the same there: only the disk of a machine is sent")
        taken = {*admitting, *(each.id for each in await INSTANCES.readable(self.context.store))}
        if not _ID.fullmatch(new_id) or new_id in taken:
            raise Conflict("the ID of the instance is taken on the other host", "run it anew there")
        draft = self._draft(tenant, spec, images, new_id, start=True)
        draft = msgspec.structs.replace(draft, ticket=ticket, arriving=True)
        return await self._validated(owner, images, networks, draft, admitting)

    async def check_replacement(self, by: Authority, tenant: str, name: str, spec: InstanceSpec) -> None:
        """Check what can be checked of an instance that is to be in place of the one of this name, before that one is
        removed: also that its addresses are free then, and that its image has what it names. Invalid, Denied, NotFound,
        Conflict, QuotaExceeded."""
        spec, owner, images, networks = await self._checked(by, tenant, spec)
        usage = (await guard(self.context.store, tenant)).value
        before = await INSTANCES.get(self.context.store, tenant, name)
        if before:
            usage = subtract(usage, of_instance(before.value.spec, before.value.config))
        add(owner.value, usage, of_instance(spec, images[0].value.config))
        for network, attachment in zip(networks, spec.networks, strict=True):
            await self.ports.check(network.value, attachment, before.value.ports if before else ())
        owner_before = (
            owner_of(before.value) if before else ExternalClaim(tenant=tenant, kind="instance", name=name, id="")
        )
        await self.external.plan(
            owner_before, claims_of(spec.published), claims_of(before.value.spec.published) if before else ()
        )
        draft = self._draft(tenant, spec, images, before.value.id if before else "0" * 32, start=False)
        await self.context.driver(draft).validate(owner.value, draft)

    async def check_networks(self, instance: Instance, wanted: Sequence[NetworkAttachment]) -> None:
        """Check that an instance could have these networks in place of its own. None is taken. Invalid, NotFound,
        Conflict."""
        for attachment in check_networks(wanted):
            if attachment not in instance.spec.networks:
                network = await self.networks.find(instance.tenant, attachment.network)
                await self.ports.check(network.value, attachment, instance.ports)

    def _draft(
        self, tenant: str, spec: InstanceSpec, images: Sequence[Found[Image]], new_id: str, *, start: bool
    ) -> Instance:
        """A new instance of the first image; the others are those of CDs."""
        image, *cds = (each.value for each in images)
        return Instance(
            tenant=tenant,
            name=spec.name or make_name(spec.image),
            host=self.context.host,
            id=new_id,
            spec=spec,
            image_digest=image.digest,
            root=_root(spec, image, cds),
            config=image.config,
            wanted="running" if start else "stopped",
            starts=1 if start else 0,
            created=time.time(),
        )

    async def _checked(
        self, by: Authority, tenant: str, spec: InstanceSpec
    ) -> tuple[InstanceSpec, Found[Tenant], Sequence[Found[Image]], Sequence[Found[Network]]]:
        """Return the spec in canonical form, and what it names. Invalid, Denied, NotFound, Conflict."""
        names = [spec.image]
        if isinstance(spec.options, MachineOptions) and spec.options.cdrom:
            names.append(spec.options.cdrom)
        (spec, owner, networks), images = await asyncio.gather(
            self._checked_spec(by, tenant, spec),
            asyncio.gather(*(self.images.find(tenant, name) for name in names)),
        )
        return spec, owner, images, networks

    async def _checked_spec(
        self, by: Authority, tenant: str, spec: InstanceSpec
    ) -> tuple[InstanceSpec, Found[Tenant], Sequence[Found[Network]]]:
        """Do the work of `_checked`, but for the image."""
        spec = check(spec)
        admit(by, tenant, spec)
        check_room(self.context)
        owner = await self.tenants.find(tenant)
        networks = [await self.networks.find(tenant, each.network) for each in spec.networks]
        resources = with_disk_defaults(owner.value.limits, spec.resources, self.context.settings.storage)
        return msgspec.structs.replace(spec, resources=resources), owner, networks

    async def _commit(
        self, owner: Found[Tenant], networks: Sequence[Found[Network]], there: Sequence[Compare], draft: Instance
    ) -> Found[Instance]:
        """Commit an instance, if what has its images is `there`."""
        store, tenant, spec = self.context.store, draft.tenant, draft.spec
        names = chain([draft.name], (make_name(spec.image) for _ in count()))
        attached = [*zip((each.value for each in networks), spec.networks, strict=True)]
        account = self.accounts.baseline(self.context.driver_for(spec), tenant, draft.id)

        async def propose() -> Proposal[Instance]:
            usage = await guard(store, tenant)
            rest = add(owner.value, usage.value, of_instance(spec, draft.config))
            name = spec.name or next(names)
            ports = await self.ports.allocate(name, attached)
            project = await choose_project(self.context, draft.id)
            instance = msgspec.structs.replace(
                draft,
                name=name,
                spec=msgspec.structs.replace(spec, name=name),
                ports=ports,
                project_id=project and project.id,
            )
            compares = [
                INSTANCES.absent(tenant, name),
                TENANTS.unchanged(owner, tenant),
                USAGE.unchanged(usage, tenant),
                *there,
                *(NETWORKS.unchanged(each, tenant, each.value.name) for each in networks),
            ]
            writes = [
                INSTANCES.put(instance, tenant, name),
                USAGE.put(rest, tenant),
                await ledger_with(store, tenant, rest),
                *([ACCOUNTS.put(account, tenant, draft.id)] if account else []),
            ]
            claims = await self.external.plan(owner_of(instance), claims_of(spec.published))
            reservations = [each for port in ports for each in port_reservations(port)]
            reservations += [project.reservation] if project else []
            return Proposal(instance, reservations, [*compares, *claims.compares], [*writes, *claims.writes])

        def refuse(key: str, instance: Instance) -> None:
            _explain(key, instance, named=bool(spec.name))

        made = await allocate(store, self.context.allocators, propose, refuse)
        if account:
            self.accounts.begin(tenant, draft.id, account)
        return made


def _root(spec: InstanceSpec, image: Image, cds: Sequence[Image]) -> Root:
    """What an instance of an image is made of, with CDs in its drives. Invalid."""
    found = [inserted(each) for each in cds]
    if image.disk is None:
        return OverlayRoot(layers=image.layers)
    if not isinstance(spec.options, MachineOptions):
        raise Invalid(f"image {image.name} is the disk of a virtual machine", "run it with --vm")
    return msgspec.structs.replace(image.disk, inserted=found)


def _explain(key: str, instance: Instance, *, named: bool) -> None:
    """Return if another proposal may succeed after a conflict at `key`, else raise an error for the user. `named`: the
    user chose the name."""
    tenant, name, spec = instance.tenant, instance.name, instance.spec
    if key == INSTANCES.key(tenant, name):
        if named:
            raise Conflict(f"tenant {tenant} has an instance {name} already", "choose another name, or remove that one")
    elif key in (TENANTS.key(tenant), *(NETWORKS.key(tenant, port.network) for port in instance.ports)):
        raise Conflict(f"tenant {tenant} was changed at the same time", "try again")
    elif key.startswith(IMAGES.prefix_all()):
        raise Conflict(f"image {spec.image} was changed at the same time", "try again")
    else:
        explain_port(key, spec.networks)


def explain_port(key: str, attachments: Iterable[NetworkAttachment]) -> None:
    """Raise Conflict if the key is the reservation of an address that one of these asks for."""
    value = key.rpartition("/")[2]
    if any(value in (each.address, each.address6) for each in attachments):
        raise Conflict(f"address {value} is taken", "leave the address out to get a free one")
    if any(value == each.mac for each in attachments):
        raise Conflict(f"MAC address {value} is taken", "leave it out to get a free one")


async def respecify(
    context: Context,
    before: Instance,
    revision: int,
    spec: InstanceSpec,
    *,
    undo: bool = False,
    claims: ClaimPlan = _NO_CLAIMS,
    there: Sequence[Compare] = (),
) -> Found[Instance]:
    """Commit another spec of an instance, within its tenant's quota, and return the changed instance. QuotaExceeded;
    TransactionConflict if the instance or its tenant was changed meanwhile.

    `undo` takes such a change back, even if that exceeds the quota by now. `claims` is committed with it, if what it
    needs is `there`.
    """
    tenant, name = before.tenant, before.name
    after = msgspec.structs.replace(before, spec=spec, generation=before.generation + 1)
    counts = of_instance(before.spec, before.config), of_instance(spec, before.config)

    async def attempt(guard: Found[Usage]) -> Found[Instance]:
        owner = await TENANTS.get(context.store, tenant)
        if owner is None:
            raise NotFound(f"there is no tenant {tenant}", "`insula tenant ls` lists them")
        usage = exchange(guard.value, *counts) if undo else change(owner.value, guard.value, *counts)
        changed = await context.store.transact(
            [
                USAGE.unchanged(guard, tenant),
                Compare(INSTANCES.key(tenant, name), revision),
                TENANTS.unchanged(owner, tenant),
                *claims.compares,
                *there,
            ],
            [
                INSTANCES.put(after, tenant, name),
                USAGE.put(usage, tenant),
                await ledger_with(context.store, tenant, usage),
                *claims.writes,
            ],
        )
        return Found(after, changed)

    return await guarded(context.store, tenant, attempt)


async def delete_instance(context: Context, instance: Instance, accounts: Accounts) -> bool:
    """Delete the instance from the store, with its status, snapshots, reservations and part of the usage, and detach
    its floating addresses. What it has used is moved to the tenant's ledger. Return whether packets from outside led to
    it.

    This is not durable. If a power failure undoes it, the instance is removed again: its removal is desired, which is
    durable, or its start is over, as the record in its directory says. So the directory may be removed only after
    `Store.flush`.
    """
    tenant, name = instance.tenant, instance.name
    own = [each for port in instance.ports for each in port_reservations(port)]

    async def attempt(guard: Found[Usage]) -> bool:
        usage = subtract(guard.value, of_instance(instance.spec, instance.config))
        snapshots = (await context.store.list(SNAPSHOTS.prefix(tenant, instance.id))).entries
        usage = subtract(usage, of_snapshots(each.value for each in SNAPSHOTS.sort_out(snapshots)[0]))
        floating = FLOATING_IPS.sort_out((await context.store.list(FLOATING_IPS.prefix(tenant))).entries)[0]
        detaching = detached([each.value for each in floating], instance.id)
        await context.store.transact(
            [Compare(USAGE.key(tenant), guard.revision)],
            [
                INSTANCES.delete(tenant, name),
                STATUS.delete(tenant, name),
                EVENTS.delete(tenant, name),
                *(Delete(each.key) for each in snapshots),
                USAGE.put(usage, tenant),
                ACCOUNTS.delete(tenant, instance.id),
                await ledger_with(context.store, tenant, usage, used),
                *(reservation.delete() for reservation in own),
                *released(instance),
                *detaching,
            ],
            durable=False,
        )
        return bool(detaching or instance.spec.published)

    async with accounts.closing(tenant, instance.id) as used:
        led = await guarded(context.store, tenant, attempt)
    context.allocators.release(own)
    return led
