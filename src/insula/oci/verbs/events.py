"""``events ID``: events of a container as lines of JSON, in runc's format.

    {"type":"oom","id":"web"}                            the kernel killed one of its processes, out of memory
    {"type":"stats","id":"web","data":{"cpu":{…},…}}     its resource usage, every --interval, or once with --stats

It ends with the container. Memory events, the end of PID 1 (a pidfd) and the interval are waited for in one poll(2).
"""

from __future__ import annotations

import os

from insula.model.cpython import dumps
from insula.model.errors import Conflict, Invalid
from insula.oci.state import Container
from insula.oci.verbs.pause import group_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from insula.kernel.cgroups import Cgroup
    from insula.oci.options import VerbArguments
    from insula.oci.state import StateRecord

_LOOK, _PATIENCE = 0.01, 2.0  # seconds between reads of the kill counter, and until no kill is assumed


def run(arguments: VerbArguments) -> int:
    container = Container(arguments.root, arguments.id)
    interval = 5.0 if arguments.interval is None else arguments.interval
    if interval <= 0:
        raise Invalid("--interval is not positive", "as in 5s")
    record = container.load()
    group = group_of(record)
    if container.status(record) in ("stopped", "creating"):
        raise Conflict(f"container not running: {container.id}", "only a running container uses resources")
    if arguments.stats:
        _print("stats", container.id, statistics(group.stats()))
        return 0
    return _watch(container.id, record, group, interval)


def _watch(name: str, record: StateRecord, group: Cgroup, interval: float) -> int:
    import select
    import time

    from insula.kernel import process

    try:
        pidfd = process.open_process(record["pid"], record["start_time"])
    except ProcessLookupError:
        return 0
    try:
        with group.oom_notifications() as memory:
            poll = select.poll()
            poll.register(memory, select.POLLIN)
            poll.register(pidfd, select.POLLIN)
            kills, due, expected = group.oom_kills(), time.monotonic(), 0.0
            while True:
                # with version 1 the event comes before the kill, so the counter is read for a while
                wake = min(due, time.monotonic() + _LOOK) if time.monotonic() < expected else due
                ready = {fd for fd, _ in poll.poll(max(0.0, wake - time.monotonic()) * 1000)}
                if memory.fileno() in ready:
                    memory.take()
                    expected = time.monotonic() + _PATIENCE
                if (now := group.oom_kills()) > kills:
                    kills = now
                    _print("oom", name)
                if pidfd in ready:
                    if group.oom_kills() > kills:  # the kill came after its event, and took PID 1
                        _print("oom", name)
                    return 0
                if time.monotonic() >= due:
                    _print("stats", name, statistics(group.stats()))
                    due = time.monotonic() + interval
    except FileNotFoundError:  # the group went, and the container with it
        return 0
    finally:
        os.close(pidfd)


def _print(kind: str, name: str, data: dict[str, Any] | None = None) -> None:
    print(dumps({"type": kind, "id": name, **({"data": data} if data else {})}), flush=True)


def statistics(stats: dict[str, Any]) -> dict[str, Any]:
    """`Cgroup.stats` in the format of runc's events."""
    cpu, memory, pids = stats.get("cpu", {}), stats.get("memory", {}), stats.get("pids", {})
    raw = memory.get("stat", {})
    swap = {"usage": memory.get("swap") or 0, "limit": memory.get("swap_limit") or 0}
    return {
        "cpu": {
            "usage": {
                "total": cpu.get("usage", 0),
                "percpu": cpu.get("per_cpu", []),
                "kernel": cpu.get("system", 0),
                "user": cpu.get("user", 0),
            },
            "throttling": {
                "periods": cpu.get("periods", 0),
                "throttledPeriods": cpu.get("throttled_periods", 0),
                "throttledTime": cpu.get("throttled", 0),
            },
        },
        "memory": {
            "cache": raw.get("file", raw.get("cache", 0)),
            "usage": {
                "limit": memory.get("limit") or 0,
                "usage": memory.get("usage", 0),
                "max": memory.get("peak") or 0,
                "failcnt": memory.get("failures") or 0,
            },
            "swap": swap,
            "raw": raw,
        },
        "pids": {"current": pids.get("current", 0), "limit": pids.get("limit") or 0},
        "blkio": {
            "ioServiceBytesRecursive": _blocks(stats.get("io", {}), "bytes"),
            "ioServicedRecursive": _blocks(stats.get("io", {}), "operations"),
        },
        "hugetlb": {
            size: {"usage": entry["usage"] or 0, "failcnt": entry["failures"] or 0}
            for size, entry in stats.get("hugetlb", {}).items()
        },
        **({"pressure": stats["pressure"]} if "pressure" in stats else {}),
    }


def _blocks(devices: dict[str, dict[str, int]], unit: str) -> list[dict[str, Any]]:
    found = []
    for device, numbers in devices.items():
        major, minor = map(int, device.split(":"))
        for op in ("Read", "Write"):
            value = numbers.get(f"{op.lower()}_{unit}", 0)
            found.append({"major": major, "minor": minor, "op": op, "value": value})
    return found
