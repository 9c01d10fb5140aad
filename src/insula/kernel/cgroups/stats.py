"""Usage of a group, with the same keys for both versions; all counters count from its beginning.

    cpu.usage, .user, .system            processor time, nanoseconds
    cpu.periods                          periods of the quota (cpu.cfs_quota_us, cpu.max) that have gone by
    cpu.throttled_periods                those in which it was used up
    cpu.throttled                        how long processes waited for the next one, nanoseconds
    cpu.per_cpu                          usage of each processor, nanoseconds; version 1 only
    memory.usage                         bytes, page cache and kernel memory included
    memory.working_set                   usage without the inactive page cache, which is easily reclaimed
    memory.limit                         bytes; None without one
    memory.peak                          the highest usage ever (version 2: Linux 5.19)
    memory.swap, .swap_limit             bytes swapped out, and their limit; None: no limit, or not counted
    memory.failures                      how often an allocation hit the limit
    memory.oom_kills                     processes killed by the OOM killer
    memory.stat                          the kernel's own names and numbers (memory.stat)
    pids.current, .limit                 processes and threads; the limit is None without one
    io                                   "MAJOR:MINOR" to read_bytes, write_bytes, read_operations, write_operations
    hugetlb                              "2MB" and so on to usage, limit, failures
    pressure                             pressure stall information of the group (Linux 4.20 with PSI; version 2 only)

Values that the kernel does not report are absent. `pressure` has "cpu", "memory" and "io", each with "some" (at least
one process waited) and "full" (all of them did): "avg10", "avg60" and "avg300" are percent of the last 10, 60 and 300
seconds, "total" is in microseconds (the kernel's psi.rst).
"""

from __future__ import annotations

import os

from insula.kernel.cgroups.files import fields
from insula.kernel.cgroups.files import read as content

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Stats = dict[str, Any]
else:
    Stats = dict

_TICK = 10_000_000  # USER_HZ is 100 everywhere: nanoseconds of one
_NO_LIMIT = 1 << 62  # version 1 says "unlimited" by a number just below 2⁶³


# -- version 2 ------------------------------------------------------------------------------------------------------


def read_v2(at: str) -> Stats:
    """Read the usage of the version 2 group at the directory `at`; the module's docstring has the keys."""
    cpu, memory = fields(f"{at}/cpu.stat"), fields(f"{at}/memory.stat")
    events = fields(f"{at}/memory.events")
    return {
        "cpu": _renamed(
            cpu,
            usage=("usage_usec", 1000),
            user=("user_usec", 1000),
            system=("system_usec", 1000),
            periods=("nr_periods", 1),
            throttled_periods=("nr_throttled", 1),
            throttled=("throttled_usec", 1000),
        ),
        "memory": _memory(
            memory,
            usage=_number(f"{at}/memory.current"),
            inactive=memory.get("inactive_file", 0),
            limit=_number(f"{at}/memory.max"),
            peak=_number(f"{at}/memory.peak"),
            swap=_number(f"{at}/memory.swap.current"),
            swap_limit=_number(f"{at}/memory.swap.max"),
            failures=events.get("max", 0),
            oom_kills=events.get("oom_kill", 0),
        ),
        "pids": _pids(at),
        "io": _io_v2(content(f"{at}/io.stat") or ""),
        "hugetlb": _hugetlb(at, "current", "max"),
        "pressure": _pressure(f"{at}/{{}}.pressure"),
    }


def _io_v2(text: str) -> dict[str, dict[str, int]]:
    names = {"rbytes": "read_bytes", "wbytes": "write_bytes", "rios": "read_operations", "wios": "write_operations"}
    found: dict[str, dict[str, int]] = {}
    for line in text.splitlines():
        device, *pairs = line.split()
        numbers = (pair.split("=") for pair in pairs)
        found[device] = {names[name]: int(value) for name, value in numbers if name in names}
    return {device: numbers for device, numbers in found.items() if numbers}


# -- version 1 ------------------------------------------------------------------------------------------------------


def read_v1(at: dict[str, str], oom_kills: int) -> Stats:
    """Read the usage of a version 1 group; `at` has its directories by controller."""
    memory, cpu = at.get("memory", "/nonexistent"), at.get("cpu", "/nonexistent")
    numbers = fields(f"{memory}/memory.stat")
    usage, limit = _number(f"{memory}/memory.usage_in_bytes"), _number(f"{memory}/memory.limit_in_bytes")
    both = _number(f"{memory}/memory.memsw.usage_in_bytes")
    both_limit = _number(f"{memory}/memory.memsw.limit_in_bytes")
    return {
        "cpu": _cpu_v1(cpu, at.get("cpuacct", "/nonexistent")),
        "memory": _memory(
            numbers,
            usage=usage,
            inactive=numbers.get("total_inactive_file", 0),
            limit=limit,
            peak=_number(f"{memory}/memory.max_usage_in_bytes"),
            swap=None if both is None or usage is None else max(0, both - usage),
            swap_limit=None if both_limit is None or limit is None else both_limit - limit,
            failures=_number(f"{memory}/memory.failcnt"),
            oom_kills=oom_kills,
        ),
        "pids": _pids(at.get("pids", "/nonexistent")),
        "io": _io_v1(at.get("blkio", "/nonexistent")),
        "hugetlb": _hugetlb(at["hugetlb"], "usage_in_bytes", "limit_in_bytes") if "hugetlb" in at else {},
    }


def _cpu_v1(cpu: str, accounting: str) -> Stats:
    quota, ticks = fields(f"{cpu}/cpu.stat"), fields(f"{accounting}/cpuacct.stat")
    found: Stats = {}
    if (usage := _number(f"{accounting}/cpuacct.usage")) is not None:
        found["usage"] = usage
        found |= _renamed(ticks, user=("user", _TICK), system=("system", _TICK))
        found["per_cpu"] = [int(word) for word in (content(f"{accounting}/cpuacct.usage_percpu") or "").split()]
    found |= _renamed(
        quota, periods=("nr_periods", 1), throttled_periods=("nr_throttled", 1), throttled=("throttled_time", 1)
    )
    return found


def _io_v1(at: str) -> dict[str, dict[str, int]]:
    """Read the counters of the throttling layer, which counts every request with any I/O scheduler."""
    found: dict[str, dict[str, int]] = {}
    for file, unit in (("io_service_bytes", "bytes"), ("io_serviced", "operations")):
        for line in (content(f"{at}/blkio.throttle.{file}_recursive") or "").splitlines():
            words = line.split()
            if len(words) == 3 and words[1] in ("Read", "Write"):
                found.setdefault(words[0], {})[f"{words[1].lower()}_{unit}"] = int(words[2])
    return found


# -- both -----------------------------------------------------------------------------------------------------------


def _memory(stat: dict[str, int], *, usage: int | None, inactive: int, **more: int | None) -> Stats:
    if usage is None:
        return {}
    return {"usage": usage, "working_set": max(0, usage - inactive), **more, "stat": stat}


def _pids(at: str) -> Stats:
    current = _number(f"{at}/pids.current")
    return {} if current is None else {"current": current, "limit": _number(f"{at}/pids.max")}


def _hugetlb(at: str, usage: str, limit: str) -> dict[str, dict[str, int | None]]:
    """Read one entry for each page size that has a file ``hugetlb.SIZE.…``."""
    try:
        sizes = {name.split(".")[1] for name in os.listdir(at) if name.startswith("hugetlb.")}
    except FileNotFoundError:
        return {}
    found: dict[str, dict[str, int | None]] = {}
    for size in sorted(sizes):
        file = f"{at}/hugetlb.{size}"
        failures = fields(f"{file}.events").get("max") or _number(f"{file}.failcnt")
        found[size] = {"usage": _number(f"{file}.{usage}"), "limit": _number(f"{file}.{limit}"), "failures": failures}
    return found


def _pressure(pattern: str) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for what in ("cpu", "memory", "io"):
        for line in (content(pattern.format(what)) or "").splitlines():
            kind, *pairs = line.split()
            found.setdefault(what, {})[kind] = {name: float(value) for name, value in (p.split("=") for p in pairs)}
    return found


def _renamed(numbers: dict[str, int], **names: tuple[str, int]) -> dict[str, int]:
    """Return the existing entries of `numbers` under other names and in another unit."""
    return {name: numbers[theirs] * unit for name, (theirs, unit) in names.items() if theirs in numbers}


def _number(path: str) -> int | None:
    """Read a file with a number; None for "max", for version 1's largest number, and if there is no such file."""
    text = content(path) or ""
    number = int(text) if text.lstrip("-").isdigit() else -1
    return number if 0 <= number < _NO_LIMIT else None
