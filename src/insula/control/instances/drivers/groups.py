"""Control groups of tenants. A tenant's group is the parent of all of its instances' groups, and has its limits."""

from __future__ import annotations

import errno
import functools
import os
from pathlib import Path

from insula.control.instances.drivers.base import GroupCounters
from insula.control.instances.drivers.directory import boot_id
from insula.kernel.cgroups import Cgroup, Resources
from insula.kernel.cgroups.base import distinct
from insula.model.errors import Failed
from insula.model.guarantees import Floors, InstanceFloors
from insula.model.objects import Limits, Tenant

_WEIGHTS, _LIGHT = 10_000, 5  # cpu.weight of the whole host, and of a group without a floor beside others
_SHARES, _LIGHT_SHARES = 262_144, 131  # the same for cpu.shares of version 1
_CPU_PERIOD = 100_000  # µs
_HUGE_PAGES = Path("/sys/kernel/mm/hugepages")


class TenantGroups:
    """The groups ``PREFIX/TENANT`` in each hierarchy. Every method blocks."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._without_floors: set[str] = set()  # tenants whose groups have the usual values

    def group(self, name: str) -> Cgroup:
        return Cgroup(f"{self.prefix}/{name}")

    def ensure(self, tenant: Tenant) -> None:
        """Make or repair the control group with the tenant's limits. Failed."""
        group, limits, defaults = self.group(tenant.name), tenant.limits, Limits()
        quota = -1 if limits.cpus is None else int(limits.cpus * _CPU_PERIOD)
        memory = -1 if limits.memory is None else limits.memory
        pids = -1 if limits.pids is None else limits.pids
        cpu: Resources = {"cpu": {"quota": quota, "period": _CPU_PERIOD}}
        ram: Resources = {"memory": {"limit": memory, "checkBeforeUpdate": True}}
        try:
            group.create()
            _leave_pids_to_the_host(Cgroup(self.prefix))
            for limit, usual, resources in (
                (limits.cpus, defaults.cpus, cpu),
                (limits.memory, defaults.memory, ram),
                (limits.pids, defaults.pids, {"pids": {"limit": pids}}),
                (None, None, {"hugepageLimits": no_huge_pages() if group.tree.unified else []}),
            ):
                try:
                    group.update(resources)
                except OSError as error:  # no error on a host that lacks a controller, if there is no limit to set
                    if limit not in (None, usual) or error.errno != errno.EOPNOTSUPP:
                        raise
        except OSError as error:
            if error.errno == errno.EBUSY:
                what = f"tenant {tenant.name} can't be limited so: {error.strerror}"
                raise Failed(what, "stop instances, or allow more") from error
            hint = "`insula doctor` tells what this host lacks"
            raise Failed(f"the control group of tenant {tenant.name} can't be made: {error}", hint) from error

    def promise(self, name: str, floors: Floors) -> None:
        """Set the weights and the protected memory of a tenant's group, and of those of its instances. Failed."""
        usual = Floors(all_memory=floors.all_memory, instances=dict.fromkeys(floors.instances, InstanceFloors()))
        nothing = floors == usual
        if nothing and name in self._without_floors:
            return
        group = self.group(name)
        members = {id_: Cgroup(f"{group.path}/{id_}") for id_ in floors.instances}
        try:
            _protect(Cgroup(self.prefix), floors.all_memory)
            _promise(group, floors.cpus, floors.memory, shared=floors.shared)
            among = any(each.cpus is not None for each in floors.instances.values())
            for id_, member in members.items():
                if member.exists():
                    each = floors.instances[id_]
                    _promise(member, each.cpus, each.memory, shared=among)
            (self._without_floors.add if nothing else self._without_floors.discard)(name)
        except OSError as error:
            self._without_floors.discard(name)
            hint = "`insula doctor` tells what this host lacks"
            raise Failed(f"CPU and memory of tenant {name} can't be promised: {error}", hint) from error

    def of_images(self, name: str) -> list[str]:
        """Make the group below the tenant's for processes that fetch and send images. Returns the files to which a
        process writes ``0`` to join it; none on a host without control groups. OSError."""
        group = Cgroup(f"{self.prefix}/{name}/images")
        try:
            group.create()
        except FileNotFoundError:
            return []
        return [f"{each}/{group.members}" for each in distinct(group.directories())]

    def counters(self, name: str) -> GroupCounters | None:
        """The counters of the tenant's group; None if it is not there."""
        return counters(self.group(name))

    def remove(self, name: str) -> None:
        """Remove the tenant's group and those below it. OSError, Failed."""
        self.group(name).remove()

    def take_down(self) -> None:
        """Remove the groups of all tenants. OSError, Failed."""
        Cgroup(self.prefix).remove()


def _promise(group: Cgroup, cpus: float | None, memory: int | None, *, shared: bool) -> None:
    """Set a group's floors. Processors are shared by weight among groups of one parent: one with a floor weighs what it
    is promised, and others little while any has a floor (`shared`). Memory below the floor is reclaimed last. OSError,
    but not on a host that lacks a controller if nothing is promised."""
    _protect(group, memory)
    part = None if cpus is None else min(cpus / len(os.sched_getaffinity(0)), 1.0)
    if group.tree.unified:
        weight = 100 if not shared else max(1, round(_WEIGHTS * part)) if part is not None else _LIGHT
        weights: Resources = {"unified": {"cpu.weight": str(weight)}}
    else:
        shares = 1024 if not shared else max(2, round(_SHARES * part)) if part is not None else _LIGHT_SHARES
        weights = {"cpu": {"shares": shares}}
    _update(group, weights, needed=cpus is not None)


def _protect(group: Cgroup, memory: int | None) -> None:
    """Set a group's protected memory. OSError."""
    low: Resources = {"unified": {"memory.low": str(memory or 0)}}
    _update(group, low if group.tree.unified else {"memory": {"reservation": memory or -1}}, needed=bool(memory))


def _update(group: Cgroup, resources: Resources, *, needed: bool) -> None:
    try:
        group.update(resources)
    except OSError as error:
        if needed or error.errno != errno.EOPNOTSUPP:
            raise


def counters(group: Cgroup) -> GroupCounters | None:
    """The counters of a group; None if it is not there, or if the host doesn't count processor time."""
    try:
        inode, cpu, memory = group.counters()
    except OSError:
        return None
    return GroupCounters(f"{_boot()}-{inode:x}", cpu, memory)


@functools.cache
def _boot() -> str:
    return boot_id().replace("-", "")[:16]


def no_huge_pages() -> list[dict[str, object]]:
    """`linux.resources.hugepageLimits` that allow no huge pages: the host's pool (hugetlbpage.rst) is for others."""
    sizes = (int(path.name.removeprefix("hugepages-").removesuffix("kB")) for path in _HUGE_PAGES.glob("hugepages-*kB"))
    units = ((1 << 20, "GB"), (1 << 10, "MB"), (1, "KB"))  # as the names of the files have them: hugetlb.2MB.max
    return [
        {"pageSize": next(f"{size // unit}{name}" for unit, name in units if size >= unit), "limit": 0}
        for size in sizes
    ]


def _leave_pids_to_the_host(everything: Cgroup) -> None:
    """Limit all tenants together to three quarters of the host's PIDs and threads (proc(5)). OSError; nothing happens
    on a host without the controller."""
    most = min(int(Path(f"/proc/sys/kernel/{name}").read_text()) for name in ("pid_max", "threads-max"))
    try:
        everything.limit({"pids": {"limit": most * 3 // 4}})
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
