"""Tenants: create, look at, update, remove.

A tenant owns a range of 65,536 user and group IDs on the host, which its instances' user namespaces map to 0…65535.
The ranges lie from 0x40000000 up to 0x70000000, for 12,288 tenants: above what useradd(8) hands out to users as
subordinate IDs (SUB_UID_MAX in login.defs(5), 600,100,000), below 0x70000000, where systemd's other ranges begin,
and below 2³¹, from where on programs take IDs for negative numbers. systemd sets the same part of the ID space
aside for container managers (0x00080000 to 0x6FFFFFFF; its UIDS-GIDS document).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from insula.control import claims
from insula.control.claims import Claim
from insula.control.context import Context
from insula.control.instances.specs import check_labels
from insula.control.keys import IMAGES, INSTANCES, NETWORKS, TENANTS, USAGE
from insula.control.quotas import check_covers, check_limits, guarded, merge
from insula.kernel.cgroups import Cgroup, Resources
from insula.model.errors import Conflict, Denied, Failed, InsulaError, NotFound
from insula.model.objects import IDS_PER_TENANT, Limits, Tenant
from insula.model.units import check_label, shorten
from insula.model.views import LimitsPatch, TenantView, Usage
from insula.store.protocol import TransactionConflict
from insula.store.typed import Found

DEFAULT = "default"
FIRST_ID = 0x40000000
MAX_TENANTS = (0x70000000 - FIRST_ID) // IDS_PER_TENANT
_INDEX = "tenant-index"
_CPU_PERIOD = 100_000
_HUGE_PAGES = Path("/sys/kernel/mm/hugepages")


class Tenants:
    def __init__(self, context: Context) -> None:
        self.context = context
        self._updating = asyncio.Lock()

    async def find(self, name: str) -> Found[Tenant]:
        """The tenant and its revision, or NotFound."""
        if found := await TENANTS.get(self.context.store, check_label("tenant", name)):
            return found
        raise NotFound(f"there is no tenant {name}", "`insula tenant ls` lists them")

    async def get(self, name: str) -> TenantView:
        tenant = (await self.find(name)).value
        usage = await USAGE.get(self.context.store, name)
        return TenantView(tenant=tenant, usage=usage.value if usage else Usage())

    async def list(self) -> list[TenantView]:
        store = self.context.store
        tenants, usages = await asyncio.gather(TENANTS.readable(store), store.list(USAGE.prefix_all()))
        usage = {}
        for entry in usages.entries:
            with contextlib.suppress(Failed):  # told as a problem of this host
                usage[USAGE.parts(entry.key)[0]] = USAGE.decode(entry)
        return [TenantView(tenant=tenant, usage=usage.get(tenant.name, Usage())) for tenant in tenants]

    async def create(self, name: str, limits: Limits | None = None, labels: dict[str, str] | None = None) -> TenantView:
        """A new tenant, with its control group and its routing domain. Invalid, Conflict; Failed changes nothing."""
        self.context.check_stays()
        check_label("tenant", name)
        limits, labels = check_limits(limits or Limits()), check_labels(labels or {})
        tenant = await self._commit(name, limits, labels)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self._erase, tenant)
            await self.ensure(tenant)
            undo.pop_all()
        return TenantView(tenant=tenant, usage=Usage())

    async def update(self, name: str, patch: LimitsPatch) -> TenantView:
        """Other limits from now on, for all of its instances together. Invalid; QuotaExceeded below what is reserved,
        Failed below what is used: then nothing was changed."""
        async with self._updating:
            before = (await self.find(name)).value
            await self._set_limits(name, check_limits(merge(before.limits, patch)))
            try:
                await asyncio.to_thread(self.ensure_cgroup, (await self.find(name)).value)
            except BaseException:
                await self._set_limits(name, before.limits, undo=True)
                await asyncio.to_thread(self.ensure_cgroup, before)
                raise
        return await self.get(name)

    async def _set_limits(self, name: str, limits: Limits, *, undo: bool = False) -> None:
        async def attempt(guard: Found[Usage]) -> None:
            found = await self.find(name)
            if not undo:
                check_covers(found.value, limits, guard.value)
            put = TENANTS.put(msgspec.structs.replace(found.value, limits=limits), name)
            compares = [USAGE.unchanged(guard, name), TENANTS.unchanged(found, name)]
            await self.context.store.transact(compares, [put])

        await guarded(self.context.store, name, attempt)

    async def _commit(self, name: str, limits: Limits, labels: dict[str, str]) -> Tenant:
        pool = self.context.pool(_INDEX)
        for _ in range(claims.ATTEMPTS):
            index = await pool.lowest(0, MAX_TENANTS, "places for tenants")
            tenant = Tenant(
                name=name,
                index=index,
                id_base=FIRST_ID + index * IDS_PER_TENANT,
                limits=limits,
                labels=labels,
                created=time.time(),
            )
            own = _claims(tenant)
            writes = [TENANTS.put(tenant, name), USAGE.put(Usage(), name)]
            try:
                await claims.commit(self.context.store, own, [TENANTS.absent(name)], writes)
                return tenant
            except TransactionConflict as conflict:
                if not claims.lost(conflict, own):
                    pool.give_back(str(index))
                    raise Conflict(f"there is a tenant {name} already", "choose another name") from None
                pool.forget()
            except BaseException:
                pool.give_back(str(index))
                raise
        raise Failed("the tenant could not be made: others were made at the same time", "try again")

    async def ensure(self, tenant: Tenant) -> None:
        """Makes or repairs what the tenant has on this host; changes nothing that is right."""
        await asyncio.to_thread(self.ensure_cgroup, tenant)
        await self.context.fabric_call(tenant.name, self.context.fabric.ensure_tenant, tenant)

    def cgroup(self, name: str) -> Cgroup:
        return Cgroup(f"{self.context.settings.prefix}/{name}")

    def ensure_cgroup(self, tenant: Tenant) -> None:
        """Make or repair the control group with the tenant's limits. Blocks. Failed."""
        group, limits, defaults = self.cgroup(tenant.name), tenant.limits, Limits()
        quota = -1 if limits.cpus is None else int(limits.cpus * _CPU_PERIOD)
        memory = -1 if limits.memory is None else limits.memory
        pids = -1 if limits.pids is None else limits.pids
        cpu: Resources = {"cpu": {"quota": quota, "period": _CPU_PERIOD}}
        ram: Resources = {"memory": {"limit": memory, "checkBeforeUpdate": True}}
        try:
            group.create()
            _leave_pids_to_the_host(Cgroup(self.context.settings.prefix))
            for limit, usual, resources in (
                (limits.cpus, defaults.cpus, cpu),
                (limits.memory, defaults.memory, ram),
                (limits.pids, defaults.pids, {"pids": {"limit": pids}}),
                (None, None, {"hugepageLimits": no_huge_pages() if group.tree.unified else []}),
            ):
                try:
                    group.update(resources)
                except OSError as error:  # a host that can't limit something can still do without a limit
                    if limit not in (None, usual) or error.errno != errno.EOPNOTSUPP:
                        raise
        except OSError as error:
            if error.errno == errno.EBUSY:
                what = f"tenant {tenant.name} can't be limited so: {error.strerror}"
                raise Failed(what, "stop instances, or allow more") from error
            hint = "`insula doctor` tells what this host lacks"
            raise Failed(f"the control group of tenant {tenant.name} can't be made: {error}", hint) from error

    async def remove(self, name: str) -> None:
        """Conflict while it has instances, networks or images of its own; the default tenant stays."""
        found = await self.check_removable(name)
        tenant = found.value

        async def attempt(guard: Found[Usage]) -> None:
            await self._refuse_if_used(name)
            await self.context.store.transact(
                [TENANTS.unchanged(found, name), USAGE.unchanged(guard, name)],
                [TENANTS.delete(name), USAGE.delete(name), *claims.release(_claims(tenant))],
            )

        try:
            await guarded(self.context.store, name, attempt)
        except TransactionConflict:
            raise Conflict(f"tenant {name} was changed at the same time", "try again") from None
        self.context.pool(_INDEX).give_back(str(tenant.index))
        await self._undo(tenant)

    async def check_removable(self, name: str) -> Found[Tenant]:
        """The tenant; Denied for the default one, NotFound."""
        found = await self.find(name)
        if name == DEFAULT:
            raise Denied(f"tenant {DEFAULT} can't be removed", "it always exists")
        return found

    async def _refuse_if_used(self, name: str) -> None:
        store = self.context.store
        for what, keyspace in (("instances", INSTANCES), ("networks", NETWORKS), ("images", IMAGES)):
            if entries := (await store.list(keyspace.prefix(name))).entries:
                names = ", ".join(keyspace.parts(entry.key)[1] for entry in entries[:3])
                raise Conflict(
                    f"tenant {name} still has {what}: {shorten(names)[1:-1]}", "remove them first, or all with --force"
                )

    async def _erase(self, tenant: Tenant) -> None:
        """Takes back a tenant whose making failed."""
        await self.context.store.transact(
            [], [TENANTS.delete(tenant.name), USAGE.delete(tenant.name), *claims.release(_claims(tenant))]
        )
        self.context.pool(_INDEX).give_back(str(tenant.index))
        await self._undo(tenant)

    async def _undo(self, tenant: Tenant) -> None:
        """Takes it off the host. What fails here is swept at the next start of the daemon."""
        try:
            try:
                await self.context.fabric_call(tenant.name, self.context.fabric.remove_tenant, tenant)
            finally:
                await asyncio.to_thread(self.cgroup(tenant.name).remove)
        except (InsulaError, OSError) as error:
            self.context.problems[f"tenant {tenant.name}"] = f"could not be taken off the host: {error}"


def no_huge_pages() -> list[dict[str, object]]:
    """`linux.resources.hugepageLimits` that allow none: who has set some aside (hugetlbpage.rst) did it for others."""
    sizes = (int(path.name.removeprefix("hugepages-").removesuffix("kB")) for path in _HUGE_PAGES.glob("hugepages-*kB"))
    units = ((1 << 20, "GB"), (1 << 10, "MB"), (1, "KB"))  # as the names of the files have them: hugetlb.2MB.max
    return [
        {"pageSize": next(f"{size // unit}{name}" for unit, name in units if size >= unit), "limit": 0}
        for size in sizes
    ]


def _leave_pids_to_the_host(everything: Cgroup) -> None:
    """Limit all tenants together to three quarters of what the host has of process numbers and threads (proc(5)).

    OSError; nothing happens on a host without the controller."""
    most = min(int(Path(f"/proc/sys/kernel/{name}").read_text()) for name in ("pid_max", "threads-max"))
    try:
        everything.limit({"pids": {"limit": most * 3 // 4}})
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise


def _claims(tenant: Tenant) -> list[Claim]:
    return [Claim(_INDEX, str(tenant.index), tenant.name)]
