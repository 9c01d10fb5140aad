"""From `linux.resources` to version 2 files (the kernel's admin-guide/cgroup-v2.rst).

The OCI runtime-spec has version 1 terms. This is the conversion that crun(1) documents and runc shares:

    memory.limit           memory.max          the same
    memory.swap            memory.swap.max     minus memory.limit: version 1 counts memory and swap together
    memory.reservation     memory.low          the same
    cpu.shares             cpu.weight          2…1024…262144 to 1…100…10000, by a curve through these three points
    cpu.quota, cpu.period  cpu.max             one file for both
    blockIO.weight         io.bfq.weight       the same; without BFQ io.weight: 10…1000 to 1…10000
    blockIO.throttle*      io.max              one file for all
    devices                                    an eBPF program, see device_program.py

-1, "no limit", becomes ``max``. `unified` is written unchanged, after all others.
"""

from __future__ import annotations

from insula.kernel.cgroups.resources_v1 import THROTTLES, hugetlb, rdma
from insula.kernel.cgroups.settings import UNLIMITED, Setting, always, has_no_swap, unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from insula.kernel.cgroups.settings import Resources

    Read = Callable[[str], str | None]

PERIOD = 100_000
"""The kernel's default period, in microseconds."""

CONTROLLERS = ("cpu", "cpuset", "io", "memory", "pids", "hugetlb", "rdma")
"""The controllers that parents enable for a group."""

# section, key, what a value that asks for nothing looks like
_NOT_THERE: tuple[tuple[str, str, tuple[object, ...]], ...] = (
    ("memory", "kernel", (0, UNLIMITED)),
    ("memory", "kernelTCP", (0, UNLIMITED)),
    ("memory", "swappiness", ()),
    ("memory", "disableOOMKiller", (False,)),
    ("memory", "useHierarchy", (True,)),
    ("cpu", "realtimeRuntime", (0,)),
    ("cpu", "realtimePeriod", (0,)),
    ("blockIO", "leafWeight", (0,)),
    ("network", "classID", (0,)),
    ("network", "priorities", ([],)),
)


def settings(resources: Resources, read: Read) -> list[Setting]:
    """Convert `linux.resources` without device rules to settings. OSError for fields that version 2 lacks.

    `read` returns the content of one of the group's files, for values that share a file with another.
    """
    for section, key, nothing in _NOT_THERE:
        value = (resources.get(section) or {}).get(key)
        if value is not None and value not in nothing:
            raise unsupported(f"{section}.{key}", "cgroup v2 has nothing like it")
    found: list[Setting] = []
    if memory := resources.get("memory"):
        found += _memory(memory, read)
    if cpu := resources.get("cpu"):
        found += _cpu(cpu, read)
    if limit := (resources.get("pids") or {}).get("limit"):
        found.append(Setting("pids.limit", "pids", "pids.max", _or_max(limit)))
    if block := resources.get("blockIO"):
        found += _block(block)
    for limit in resources.get("hugepageLimits") or ():
        found += hugetlb(limit, "max")
    found += rdma(resources)
    for file, content in (resources.get("unified") or {}).items():
        if "/" in file or file in ("", ".", ".."):
            raise unsupported(f"unified.{file}", "it is no name of a file of the group")
        # a file takes one line a write
        found += [Setting(f"unified.{file}", file.split(".")[0], file, line) for line in content.split("\n") if line]
    return found


def _memory(memory: dict[str, Any], read: Read) -> Iterator[Setting]:
    limit, swap = memory.get("limit") or 0, memory.get("swap") or 0
    if limit:
        yield Setting("memory.limit", "memory", "memory.max", _or_max(limit))
    if swap > 0 and not limit:  # an update of the sum alone
        limit = int(now) if (now := read("memory.max") or "").isdigit() else 0
    if swap < 0 or (limit < 0 and not swap):
        yield Setting("memory.swap", "memory", "memory.swap.max", "max", optional=always)
    elif swap:
        if limit <= 0 or swap < limit:
            raise unsupported("memory.swap", "it counts memory and swap together, so memory.limit must be set and less")
        yield Setting("memory.swap", "memory", "memory.swap.max", swap - limit, optional=has_no_swap)
    if reservation := memory.get("reservation"):
        yield Setting("memory.reservation", "memory", "memory.low", _or_max(reservation))


def _cpu(cpu: dict[str, Any], read: Read) -> Iterator[Setting]:
    idle, quota, period = cpu.get("idle"), cpu.get("quota") or 0, cpu.get("period") or 0
    if idle is not None:
        yield Setting("cpu.idle", "cpu", "cpu.idle", idle)
    if (shares := cpu.get("shares")) and not idle:
        yield Setting("cpu.shares", "cpu", "cpu.weight", weight_of_shares(shares))
    if quota:
        # without a period the one in force stays
        value = f"{_or_max(quota)} {period}" if period else _or_max(quota)
        yield Setting("cpu.quota", "cpu", "cpu.max", value)
    elif period:
        in_force = (read("cpu.max") or "max").split()[0]
        yield Setting("cpu.period", "cpu", "cpu.max", f"{in_force} {period}")
    if (burst := cpu.get("burst")) is not None:
        yield Setting("cpu.burst", "cpu", "cpu.max.burst", burst)
    for key in ("cpus", "mems"):
        if cpu.get(key):
            yield Setting(f"cpu.{key}", "cpuset", f"cpuset.{key}", cpu[key])


def _block(block: dict[str, Any]) -> Iterator[Setting]:
    if weight := block.get("weight"):
        yield _weight("blockIO.weight", "", weight)
    for entry in block.get("weightDevice") or ():
        if entry.get("leafWeight"):
            raise unsupported("blockIO.weightDevice", "cgroup v2 has no leafWeight")
        if weight := entry.get("weight"):
            yield _weight("blockIO.weightDevice", f"{entry['major']}:{entry['minor']} ", weight)
    for key, _, name in THROTTLES:
        for entry in block.get(key) or ():
            line = f"{entry['major']}:{entry['minor']} {name}={entry['rate'] or 'max'}"
            yield Setting(f"blockIO.{key}", "io", "io.max", line, reset="rbps=max wbps=max riops=max wiops=max")


def _weight(field: str, device: str, weight: int) -> Setting:
    linear = f"{device}{1 + (weight - 10) * 9999 // 990}"
    reset = "default" if device else None
    instead = Setting(field, "io", "io.weight", linear, reset=reset)
    return Setting(field, "io", "io.bfq.weight", f"{device}{weight}", reset=reset, instead=instead)


def weight_of_shares(shares: int) -> int:
    """Convert `cpu.shares` to cpu.weight: 2 to 1, the default of 1024 to 100, 262144 to 10000."""
    from math import ceil, log2

    if shares <= 2:
        return 1
    if shares >= 262144:
        return 10000
    power = log2(shares)
    return ceil(10 ** ((power * power + 125 * power) / 612 - 7 / 34))


def _or_max(limit: int) -> str:
    return str(limit) if limit >= 0 else "max"
