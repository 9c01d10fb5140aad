"""Tenants: create, show, update, remove.

A tenant owns a range of 65,536 user and group IDs on the host, which its instances' user namespaces map to 0…65535.
The ranges lie from 0x40000000 up to 0x70000000, for 12,288 tenants: above what useradd(8) hands out to users as
subordinate IDs (SUB_UID_MAX in login.defs(5), 600,100,000), below 0x70000000, where systemd's other ranges begin,
and below 2³¹, from where on programs take IDs for negative numbers. systemd sets the same part of the ID space
aside for container managers (0x00080000 to 0x6FFFFFFF; its UIDS-GIDS document).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

import msgspec
from msgspec import UNSET

from insula.control.accounting.accounts import Accounts
from insula.control.accounting.ledger import first_ledger
from insula.control.allocation.quotas import check_covers, check_limits, limits_of, merge
from insula.control.allocation.reservations import Reservation
from insula.control.allocation.transaction import Proposal, allocate, guarded, retried
from insula.control.context import Context
from insula.control.disk import disk_view, unlimited
from insula.control.idempotency import kept_of
from insula.control.identities.authority import no_tenant
from insula.control.identities.cache import IdentityCache
from insula.control.instances.specs import check_labels, cli_command, relabelled
from insula.control.keys import (
    ADDRESS_GROUPS,
    BINDINGS,
    CERTIFICATES,
    FLOATING_IPS,
    GUARANTEES,
    IMAGES,
    INSTANCES,
    LEDGERS,
    LOAD_BALANCERS,
    MEMBERS,
    NETWORKS,
    PEERINGS,
    POLICIES,
    PRINCIPALS,
    ROUTERS,
    SETS,
    TENANTS,
    TOKENS,
    USAGE,
)
from insula.control.networks.controller import NetworkController
from insula.control.networks.peering_records import deletes, reservation
from insula.model.errors import Conflict, Denied, Failed, InsulaError
from insula.model.objects import IDS_PER_TENANT, Limits, Tenant
from insula.model.peerings import Peering
from insula.model.quota_settings import new_limits
from insula.model.units import check_label, shorten
from insula.model.views import LimitsPatch, TenantPatch, TenantView, Usage
from insula.store.protocol import Compare, Delete, TransactionConflict
from insula.store.typed import Found

log = logging.getLogger("insula.control")
DEFAULT = "default"
FIRST_ID = 0x40000000
LAST_ID = 0x70000000
"""The first ID above those of tenants."""
MAX_TENANTS = (LAST_ID - FIRST_ID) // IDS_PER_TENANT
_INDEX = "tenant-index"


class Tenants:
    def __init__(
        self, context: Context, controller: NetworkController, cache: IdentityCache, accounts: Accounts
    ) -> None:
        self.context = context
        self.controller = controller
        self.cache = cache
        self.accounts = accounts
        self._updating = asyncio.Lock()

    async def find(self, name: str) -> Found[Tenant]:
        """The tenant and its revision. NotFound."""
        if found := await TENANTS.get(self.context.store, check_label("tenant", name)):
            return found
        raise no_tenant(name)

    async def get(self, name: str) -> TenantView:
        tenant = (await self.find(name)).value
        store, disk = self.context.store, self.context.disk
        usage = await USAGE.get(store, name)
        instances = await INSTANCES.readable(store, name) if disk.enforced else []
        view = self._view(tenant, usage.value if usage else Usage())
        return msgspec.structs.replace(view, disk=disk_view(disk, instances, tenant.limits))

    def _view(self, tenant: Tenant, usage: Usage) -> TenantView:
        return TenantView(tenant=tenant, usage=self.context.in_flight.complete(tenant.name, usage))

    async def list(self) -> list[TenantView]:
        store = self.context.store
        tenants, usages = await asyncio.gather(TENANTS.readable(store), store.list(USAGE.prefix_all()))
        usage = {}
        for entry in usages.entries:
            with contextlib.suppress(Failed):  # damaged; recorded as a problem of this host
                usage[USAGE.parts(entry.key)[0]] = USAGE.decode(entry)
        return [self._view(tenant, usage.get(tenant.name, Usage())) for tenant in tenants]

    async def created(self) -> dict[str, int]:
        """The revision of the store that each tenant was created at."""
        entries = (await self.context.store.list(TENANTS.prefix_all())).entries
        return {TENANTS.parts(entry.key)[0]: entry.created for entry in entries}

    async def create(
        self, name: str, limits: LimitsPatch | None = None, labels: dict[str, str] | None = None
    ) -> TenantView:
        """Create a tenant with its control group and routing domain. Limits that are absent are those of the settings.
        Invalid, Conflict; Failed changes nothing."""
        self.context.refuse_if_going_down()
        check_label("tenant", name)
        wanted = limits_of(new_limits(self.context.settings.quotas), limits or LimitsPatch())
        tenant = await self._commit(name, wanted, check_labels(labels or {}))
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self._erase, tenant)
            errors = await self.controller.converged(name)
            if error := errors.get("limits") or errors.get("all") or errors.get("tenant"):
                raise error
            undo.pop_all()
        return TenantView(tenant=tenant, usage=Usage())

    async def update(self, name: str, patch: TenantPatch) -> TenantView:
        """Change a tenant's labels, and the limits on all of its instances together. Invalid; QuotaExceeded if its
        instances have reserved more; Failed if the kernel refuses them. After an error nothing has changed."""
        changes = {each: value for each, value in msgspec.structs.asdict(patch).items() if value is not UNSET}
        labels = changes.pop("labels", None)
        async with self._updating:
            before = (await self.find(name)).value
            wanted = before.labels if labels is None else relabelled(before.labels, labels)
            if changes or labels is None:
                await self._change_limits(before, LimitsPatch(**changes))
            if labels is not None:
                await self._relabel(name, wanted)
        self.context.problems.solved(_record(name))
        return await self.get(name)

    async def _change_limits(self, before: Tenant, patch: LimitsPatch) -> None:
        name = before.name
        await self._set_limits(name, check_limits(merge(before.limits, patch)))
        try:
            if error := (await self.controller.converged(name)).get("limits"):
                raise error
        except BaseException:
            await self._set_limits(name, before.limits, undo=True)
            await self.controller.converged(name)
            raise

    async def relabel(self, name: str, labels: dict[str, str]) -> None:
        """Replace the labels of a tenant. The operator's policies that select it by them are in force then. Invalid,
        NotFound."""
        check_labels(labels)
        async with self._updating:
            await self._relabel(name, labels)

    async def _relabel(self, name: str, labels: dict[str, str]) -> None:
        async def attempt() -> None:
            found = await self.find(name)
            put = TENANTS.put(msgspec.structs.replace(found.value, labels=labels), name)
            await self.context.store.transact([TENANTS.unchanged(found, name)], [put])

        await retried(attempt)
        await self.controller.converged(name)

    async def _set_limits(self, name: str, limits: Limits, *, undo: bool = False) -> None:
        async def attempt(guard: Found[Usage]) -> None:
            found = await self.find(name)
            if not undo:
                check_covers(found.value, limits, guard.value)
                await self._refuse_uncounted(found.value, limits)
            put = TENANTS.put(msgspec.structs.replace(found.value, limits=limits), name)
            compares = [USAGE.unchanged(guard, name), TENANTS.unchanged(found, name)]
            revision = await self.context.store.transact(compares, [put])
            self.context.limits.take(name, limits, revision)

        await guarded(self.context.store, name, attempt)

    async def _refuse_uncounted(self, tenant: Tenant, limits: Limits) -> None:
        """Raise Conflict if a tenant without a limit of its disk gets one while instances have none: they would not be
        counted."""
        if limits.disk is None or tenant.limits.disk is not None:
            return
        instances = await INSTANCES.readable(self.context.store, tenant.name)
        if names := unlimited(instances):
            hint = f"{cli_command(tenant.name, f'update {names[0]} --disk SIZE')} sets one"
            raise Conflict(f"instance {names[0]} has no limit of its disk", hint)

    async def _commit(self, name: str, limits: Limits, labels: dict[str, str]) -> Tenant:
        async def propose() -> Proposal[Tenant]:
            index = await self.context.allocators.of(_INDEX).lowest(0, MAX_TENANTS, "places for tenants")
            tenant = _tenant(name, index, limits, labels, time.time())
            writes = [TENANTS.put(tenant, name), USAGE.put(Usage(), name), first_ledger(name)]
            return Proposal(tenant, _reservations(tenant), [TENANTS.absent(name)], writes)

        def refuse(key: str, _: Tenant) -> None:
            if key == TENANTS.key(name):
                raise Conflict(f"there is a tenant {name} already", "choose another name")

        made = await allocate(self.context.store, self.context.allocators, propose, refuse)
        self.context.limits.take(name, limits, made.revision)
        return made.value

    async def remove(self, name: str) -> None:
        """Remove a tenant. Conflict while it has instances, load balancers, floating addresses, routers, networks or
        own images; Denied for the default one."""
        found = await self.check_removable(name)
        tenant, store, ended = found.value, self.context.store, list[Peering]()

        async def attempt(guard: Found[Usage]) -> None:
            await self._refuse_if_used(name)
            rights = await self._rights(name)
            ended[:] = await PEERINGS.list(store, name)
            rights = [*rights, *(write for each in ended for write in deletes(each))]
            own = [TENANTS.delete(name), USAGE.delete(name), *(each.delete() for each in _reservations(tenant))]
            async with self.accounts.removing(tenant) as accounts:
                revision = await store.transact(
                    [TENANTS.unchanged(found, name), USAGE.unchanged(guard, name)], [*own, *rights, *accounts]
                )
            self.cache.take(rights, revision)

        try:
            await guarded(self.context.store, name, attempt)
        except TransactionConflict:
            raise Conflict(f"tenant {name} was changed at the same time", "try again") from None
        self.context.problems.solved(_record(name))
        await self._removed(tenant)
        for peering in ended:
            self.controller.nudge(peering.other(name))
        self.context.allocators.release([reservation(each) for each in ended])

    async def check_removable(self, name: str) -> Found[Tenant]:
        """Return the tenant. Denied for the default one, NotFound."""
        found = await self.find(name)
        if name == DEFAULT:
            raise Denied(f"tenant {DEFAULT} can't be removed", "it always exists")
        return found

    async def _refuse_if_used(self, name: str) -> None:
        store = self.context.store
        kinds = (
            ("instances", INSTANCES),
            ("load balancers", LOAD_BALANCERS),
            ("floating addresses", FLOATING_IPS),
            ("routers", ROUTERS),
            ("networks", NETWORKS),
            ("images", IMAGES),
        )
        for what, keyspace in kinds:
            if entries := (await store.list(keyspace.prefix(name))).entries:
                names = ", ".join(keyspace.parts(entry.key)[1] for entry in entries[:3])
                raise Conflict(
                    f"tenant {name} still has {what}: {shorten(names)[1:-1]}", "remove them first, or all with --force"
                )

    async def _rights(self, name: str) -> Sequence[Delete]:
        """The deletions of bindings, service accounts and their tokens that go with this tenant, so that they give no
        rights in a later tenant of its name; and of its guarantees, policies and address groups, its sets of declared
        state, and its accounts' idempotency keys."""
        store = self.context.store
        accounts = (await store.list(PRINCIPALS.prefix(name))).entries
        bindings = (await store.list(BINDINGS.prefix(name))).entries
        ids = {PRINCIPALS.decode(entry).id for entry in accounts}
        tokens = [TOKENS.delete(token.id) for token in self.cache.tokens() if token.principal in ids]
        tokens += [CERTIFICATES.delete(each.serial) for each in self.cache.certificates() if each.principal in ids]
        kinds = (SETS, MEMBERS, GUARANTEES, POLICIES, ADDRESS_GROUPS)
        sets = [entry for each in kinds for entry in (await store.list(each.prefix(name))).entries]
        return [*(Delete(entry.key) for entry in [*accounts, *bindings, *sets]), *tokens, *await kept_of(store, ids)]

    async def _erase(self, tenant: Tenant) -> None:
        """Remove a tenant from the store after its creation has failed."""
        own = [TENANTS.delete(tenant.name), USAGE.delete(tenant.name), LEDGERS.delete(tenant.name)]
        deletes = [*own, *(each.delete() for each in _reservations(tenant))]
        await self.context.store.transact([], deletes)
        await self._removed(tenant)

    async def _removed(self, tenant: Tenant) -> None:
        """Return when the controller has removed it from the host, or has recorded why it could not."""
        with contextlib.suppress(InsulaError):  # NotFound: it is gone
            await self.controller.converged(tenant.name)
        if not self.controller.is_here(tenant):  # else its IDs and addresses stay taken until the next start
            self.context.allocators.release(_reservations(tenant))

    async def rebuild_damaged(self) -> None:
        """Replace damaged records of tenants, so that their networks and instances are managed and can be removed.

        A tenant's IDs and addresses follow from its index, which its reservation has as well. Limits and labels are
        lost: the tenant is limited to the number of instances that it has now, until its limits are set again. That is
        recorded as a problem of this host. A record whose index is not known stays as it is.
        """
        store = self.context.store
        _, damaged = TENANTS.sort_out((await store.list(TENANTS.prefix_all())).entries)
        for entry, _ in damaged:
            (name,) = TENANTS.parts(entry.key)
            if (index := await self._claimed_index(name)) is None:
                continue
            count = len((await store.list(INSTANCES.prefix(name))).entries)
            tenant = _tenant(name, index, Limits(instances=count), {}, 0.0)
            try:
                await store.transact([Compare(entry.key, entry.revision)], [TENANTS.put(tenant, name)])
            except TransactionConflict:
                continue
            log.error("the damaged record at %s was %s", entry.key, shorten(repr(entry.value), 1000))
            hint = f"`insula tenant update {name} --instances N` and its other options set them"
            self.context.problems[_record(name)] = f"was damaged, its limits and labels are lost: {hint}"

    async def _claimed_index(self, name: str) -> int | None:
        """The index that is reserved for the tenant; None if several or none are."""
        claimed = (await self.context.store.list(f"/claims/{_INDEX}/")).entries
        found = [entry.key.rpartition("/")[2] for entry in claimed if entry.value == name.encode()]
        return int(found[0]) if len(found) == 1 and found[0].isdecimal() else None


def _record(name: str) -> str:
    """The name of the problem with a tenant's record."""
    return f"record {TENANTS.key(name)}"


def _tenant(name: str, index: int, limits: Limits, labels: dict[str, str], created: float) -> Tenant:
    id_base = FIRST_ID + index * IDS_PER_TENANT
    return Tenant(name=name, index=index, id_base=id_base, limits=limits, labels=labels, created=created)


def _reservations(tenant: Tenant) -> list[Reservation]:
    return [Reservation(_INDEX, str(tenant.index), tenant.name)]
