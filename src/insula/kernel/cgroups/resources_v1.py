"""From `linux.resources` to version 1 files (cgroups(7); the kernel's admin-guide/cgroup-v1).

The terms of the OCI runtime-spec are those of version 1, so most of the conversion is a table. A value of 0 means "not
set" in fields for which 0 is not useful, as in runc and crun: engines send it for every option that was not given.
"""

from __future__ import annotations

from insula.kernel.cgroups.settings import UNLIMITED, Setting, always, has_no_swap, unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from insula.kernel.cgroups.settings import Resources

_ZERO_COUNTS = True

# section, key, controller, file, whether 0 is a value
_TABLE = (
    ("memory", "limit", "memory", "memory.limit_in_bytes", False),
    ("memory", "swap", "memory", "memory.memsw.limit_in_bytes", False),
    ("memory", "reservation", "memory", "memory.soft_limit_in_bytes", False),
    ("memory", "kernel", "memory", "memory.kmem.limit_in_bytes", False),
    ("memory", "kernelTCP", "memory", "memory.kmem.tcp.limit_in_bytes", False),
    ("memory", "swappiness", "memory", "memory.swappiness", _ZERO_COUNTS),
    ("memory", "disableOOMKiller", "memory", "memory.oom_control", _ZERO_COUNTS),
    ("memory", "useHierarchy", "memory", "memory.use_hierarchy", _ZERO_COUNTS),
    ("cpu", "idle", "cpu", "cpu.idle", _ZERO_COUNTS),
    ("cpu", "shares", "cpu", "cpu.shares", False),
    ("cpu", "period", "cpu", "cpu.cfs_period_us", False),
    ("cpu", "quota", "cpu", "cpu.cfs_quota_us", False),
    ("cpu", "burst", "cpu", "cpu.cfs_burst_us", _ZERO_COUNTS),
    ("cpu", "realtimePeriod", "cpu", "cpu.rt_period_us", False),
    ("cpu", "realtimeRuntime", "cpu", "cpu.rt_runtime_us", False),
    ("cpu", "cpus", "cpuset", "cpuset.cpus", False),
    ("cpu", "mems", "cpuset", "cpuset.mems", False),
    ("pids", "limit", "pids", "pids.max", False),
    ("network", "classID", "net_cls", "net_cls.classid", False),
)

THROTTLES = (
    ("throttleReadBpsDevice", "blkio.throttle.read_bps_device", "rbps"),
    ("throttleWriteBpsDevice", "blkio.throttle.write_bps_device", "wbps"),
    ("throttleReadIOPSDevice", "blkio.throttle.read_iops_device", "riops"),
    ("throttleWriteIOPSDevice", "blkio.throttle.write_iops_device", "wiops"),
)


def settings(resources: Resources) -> list[Setting]:
    """Convert `linux.resources` without device rules (see devices.py) to settings, ordered for a new group.

    OSError for fields that version 1 lacks.
    """
    found = []
    for section, key, controller, file, zero in _TABLE:
        value = (resources.get(section) or {}).get(key)
        if value is None or (not zero and not value):
            continue
        if file == "pids.max" and value < 0:
            value = "max"
        elif file == "cpu.shares" and (resources["cpu"].get("idle") or 0) > 0:
            continue  # an idle group has no share
        if isinstance(value, bool):
            value = int(value)
        needed = has_no_swap if key == "swap" and value != UNLIMITED else None
        if value == UNLIMITED and key in ("swap", "kernelTCP"):
            needed = always
        found.append(Setting(f"{section}.{key}", controller, file, value, optional=needed))
    memory = resources.get("memory") or {}
    if memory.get("limit") and not memory.get("kernelTCP"):
        # version 1 counts the buffers of TCP and UDP sockets separately, and only in groups where this is set
        sockets = "memory.kmem.tcp.limit_in_bytes"
        found.append(Setting("memory.limit", "memory", sockets, memory["limit"], optional=always))
    if memory.get("limit") == UNLIMITED and not memory.get("swap"):
        # unlimited memory would exceed the limit for memory and swap together
        swap = "memory.memsw.limit_in_bytes"
        found.append(Setting("memory.limit", "memory", swap, UNLIMITED, optional=always))
    if block := resources.get("blockIO"):
        found += _block(block)
    for limit in resources.get("hugepageLimits") or ():
        found += hugetlb(limit, "limit_in_bytes")
    for priority in (resources.get("network") or {}).get("priorities") or ():
        value = f"{priority['name']} {priority['priority']}"
        found.append(Setting("network.priorities", "net_prio", "net_prio.ifpriomap", value, reset="0"))
    found += rdma(resources)
    if resources.get("unified"):
        raise unsupported("unified", "invalid configuration: its files are those of cgroup v2, and this host has v1")
    return found


def _block(block: dict[str, Any]) -> Iterator[Setting]:
    """Convert `blockIO`; weights are files of the I/O scheduler, BFQ or before Linux 5.0 CFQ."""
    for key, bfq, cfq in (
        ("weight", "blkio.bfq.weight", "blkio.weight"),
        ("leafWeight", "blkio.leaf_weight", None),
    ):
        if value := block.get(key):
            field = f"blockIO.{key}"
            yield Setting(field, "blkio", bfq, value, instead=Setting(field, "blkio", cfq, value) if cfq else None)
    for entry in block.get("weightDevice") or ():
        if value := entry.get("weight"):
            yield _of_device(entry, "weightDevice", "blkio.bfq.weight_device", value, "blkio.weight_device")
        if value := entry.get("leafWeight"):
            yield _of_device(entry, "weightDevice", "blkio.leaf_weight_device", value)
    for key, file, _ in THROTTLES:
        for entry in block.get(key) or ():
            yield _of_device(entry, key, file, entry["rate"])


def _of_device(entry: dict[str, Any], key: str, file: str, value: int, otherwise: str | None = None) -> Setting:
    line, field = f"{entry['major']}:{entry['minor']} {value}", f"blockIO.{key}"
    instead = Setting(field, "blkio", otherwise, line, reset="0") if otherwise else None
    return Setting(field, "blkio", file, line, reset="0", instead=instead)


def hugetlb(limit: dict[str, Any], suffix: str) -> Iterator[Setting]:
    """Convert `hugepageLimits`: to the limit of pages in use, and since Linux 5.7 also to that of reserved pages.

    Beyond the limit of reserved pages mmap(2) fails; beyond that of pages in use the process gets SIGBUS.
    """
    size, value = limit["pageSize"], limit["limit"]
    if not size.isalnum():
        raise unsupported("hugepageLimits", f"{size!r} is no size of a page")
    field = "hugepageLimits"
    for kind, dispensable in ((f"hugetlb.{size}.{suffix}", None), (f"hugetlb.{size}.rsvd.{suffix}", always)):
        yield Setting(field, "hugetlb", kind, value, optional=dispensable)


def rdma(resources: Resources) -> Iterator[Setting]:
    """Convert `rdma`, which has the same file in both versions."""
    for device, limit in (resources.get("rdma") or {}).items():
        parts = [("hca_handle", limit.get("hcaHandles")), ("hca_object", limit.get("hcaObjects"))]
        words = [f"{name}={value}" for name, value in parts if value is not None]
        if words:
            reset = "hca_handle=max hca_object=max"
            yield Setting(f"rdma.{device}", "rdma", "rdma.max", f"{device} {' '.join(words)}", reset=reset)
