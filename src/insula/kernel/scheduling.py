"""Scheduling, I/O priority, CPU affinity, personality and memory policy of a process.

These are five fields of `process` and `linux` in the OCI runtime-spec, with a system call each:

    scheduler         sched_setattr(2): the policy (sched(7)), its nice value, priority or deadline
    ioPriority        ioprio_set(2): the order of disk requests, if the disk's I/O scheduler supports priorities
    execCPUAffinity   sched_setaffinity(2): the processors it may run on
    personality       personality(2): LINUX32 makes uname(2) report a 32-bit machine
    memoryPolicy      set_mempolicy(2): the NUMA nodes that its memory comes from

Children inherit all of them, and they persist over execve(2). Real-time policies and the real-time I/O class need
CAP_SYS_NICE of the host, which a process in a user namespace lacks and its parent may have. So the first two functions
take a `pid`, and change nothing if the value is already set: the process can then apply its own config again.
"""

from __future__ import annotations

import os
import struct

from insula.kernel import libc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from insula.kernel.libc import Buffer

POLICIES = {
    "SCHED_OTHER": 0,
    "SCHED_FIFO": 1,
    "SCHED_RR": 2,
    "SCHED_BATCH": 3,
    "SCHED_ISO": 4,  # in the spec, but in no kernel: EINVAL
    "SCHED_IDLE": 5,
    "SCHED_DEADLINE": 6,
}
FLAGS = {
    "SCHED_FLAG_RESET_ON_FORK": 0x01,
    "SCHED_FLAG_RECLAIM": 0x02,
    "SCHED_FLAG_DL_OVERRUN": 0x04,
    "SCHED_FLAG_KEEP_POLICY": 0x08,
    "SCHED_FLAG_KEEP_PARAMS": 0x10,
    "SCHED_FLAG_UTIL_CLAMP_MIN": 0x20,
    "SCHED_FLAG_UTIL_CLAMP_MAX": 0x40,
}
IO_CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}
MEMORY_POLICIES = {  # linux/mempolicy.h
    "MPOL_DEFAULT": 0,
    "MPOL_PREFERRED": 1,
    "MPOL_BIND": 2,
    "MPOL_INTERLEAVE": 3,
    "MPOL_LOCAL": 4,
    "MPOL_PREFERRED_MANY": 5,
    "MPOL_WEIGHTED_INTERLEAVE": 6,
}
MEMORY_FLAGS = {
    "MPOL_F_NUMA_BALANCING": 1 << 13,
    "MPOL_F_RELATIVE_NODES": 1 << 14,
    "MPOL_F_STATIC_NODES": 1 << 15,
}
MAX_NODES = 1024
"""MAX_NUMNODES of the largest kernels: the numbers of NUMA nodes are lower."""
DOMAINS = {"LINUX": 0, "LINUX32": 8}

ALL = "0-8191"
"""Every processor, for `set_affinity`: the kernel ignores those that don't exist or are not in the cpuset."""

_NR = {
    "x86_64": {
        "sched_setattr": 314,
        "sched_getattr": 315,
        "ioprio_set": 251,
        "ioprio_get": 252,
        "set_mempolicy": 238,
    },
    "aarch64": {"sched_setattr": 274, "sched_getattr": 275, "ioprio_set": 30, "ioprio_get": 31, "set_mempolicy": 237},
    "riscv64": {"sched_setattr": 274, "sched_getattr": 275, "ioprio_set": 30, "ioprio_get": 31, "set_mempolicy": 237},
}.get(os.uname().machine, {})
_ATTR = struct.Struct("IIQiIQQQII")  # linux/sched/types.h: size, policy, flags, nice, priority, three times, two clamps
_IOPRIO_WHO_PROCESS = 1
_IOPRIO_CLASS_SHIFT = 13


def set_for_child(process: Mapping[str, Any], pid: int) -> None:
    """Set scheduler and ioPriority of a spec's `process` on the child `pid`, which may lack the privilege itself."""
    if scheduler := process.get("scheduler"):
        set_scheduler(scheduler, pid)
    if priority := process.get("ioPriority"):
        set_io_priority(priority, pid)


def set_scheduler(scheduler: Mapping[str, Any], pid: int = 0) -> None:
    """Set `process.scheduler` of the spec on one thread, by default the calling one; times are in nanoseconds.

    OSError: EPERM without the privilege, EINVAL for values that the policy does not allow, EBUSY if a deadline's
    processor time exceeds what is left.
    """
    flags = 0
    for name in scheduler.get("flags") or ():
        flags |= FLAGS[name]
    wanted = _ATTR.pack(
        _ATTR.size,
        POLICIES[scheduler["policy"]],
        flags,
        scheduler.get("nice") or 0,
        scheduler.get("priority") or 0,
        scheduler.get("runtime") or 0,
        scheduler.get("deadline") or 0,
        scheduler.get("period") or 0,
        0,
        0,
    )
    # compared without the clamps, which the kernel fills in
    if get_scheduler(pid)[4:48] == wanted[4:48]:
        return
    try:
        _call("sched_setattr", pid, wanted, 0)
    except PermissionError as error:
        if scheduler["policy"] == "SCHED_DEADLINE" and len(os.sched_getaffinity(pid)) < (os.cpu_count() or 1):
            why = "process scheduler can't be used together with AllowedCPUs: it takes all processors of the host"
            raise PermissionError(error.errno, why) from None
        raise


def get_scheduler(pid: int = 0) -> bytes:
    """Return struct sched_attr of a thread, from sched_getattr(2)."""
    attr = libc.buffer(_ATTR.size)
    _call("sched_getattr", pid, attr, _ATTR.size, 0)
    return attr.raw


def set_io_priority(priority: Mapping[str, Any], pid: int = 0) -> None:
    """Set `process.ioPriority` of the spec: a class, and in it 0 (first) to 7. OSError: EPERM without the privilege."""
    wanted = IO_CLASSES[priority["class"]] << _IOPRIO_CLASS_SHIFT | (priority.get("priority") or 0)
    if _call("ioprio_get", _IOPRIO_WHO_PROCESS, pid) != wanted:
        _call("ioprio_set", _IOPRIO_WHO_PROCESS, pid, wanted)


def set_affinity(processors: str, pid: int = 0) -> None:
    """Restrict a thread to processors such as ``0-3,7``. ValueError for a bad list, OSError if none of them exists."""
    os.sched_setaffinity(pid, parse_list(processors))


def parse_list(processors: str) -> set[int]:
    """Parse a list such as ``0-3,7`` (cpuset(7)). ValueError for anything else, and for a number above 65535."""
    numbers: set[int] = set()
    for part in processors.split(","):
        first, dash, last = part.strip().partition("-")
        for number in (first, last) if dash else (first,):
            if not (number.isascii() and number.isdecimal() and len(number) <= 5 and int(number) < 1 << 16):
                raise ValueError(f"{processors!r:.60} is not a list of processors such as 0-3,7")
        if dash and int(first) > int(last):
            raise ValueError(f"{processors!r:.60} has a range whose end is lower than its start")
        numbers.update(range(int(first), int(last if dash else first) + 1))
    return numbers


def set_personality(personality: Mapping[str, Any]) -> None:
    """Set `linux.personality` of the spec on the calling process. OSError (EINVAL) for flags: the spec defines none."""
    if personality.get("flags"):
        raise OSError(22, "personality has no flags")
    libc.check(libc.function("personality")(libc.Long(DOMAINS[personality["domain"]])), "personality")


def set_memory_policy(policy: Mapping[str, Any]) -> None:
    """Set `linux.memoryPolicy` of the spec on the calling thread; it persists over execve(2). OSError."""
    mode = MEMORY_POLICIES[policy["mode"]]
    for name in policy.get("flags") or ():
        mode |= MEMORY_FLAGS[name]
    mask = sum(1 << node for node in parse_list(policy["nodes"])) if policy.get("nodes") else 0
    if mask.bit_length() > MAX_NODES:
        raise OSError(22, "there is no such memory node")
    _call("set_mempolicy", mode, mask.to_bytes(MAX_NODES // 8, "little") if mask else 0, MAX_NODES + 1 if mask else 0)


def _call(name: str, *args: int | bytes | Buffer) -> int:
    """Call syscall(2): integers are passed as long, bytes as char pointers. OSError."""
    if name not in _NR:
        raise OSError(38, f"{name}: not known on {os.uname().machine}")
    arguments = (libc.Long(a) if isinstance(a, int) else a for a in args)
    return libc.check(libc.syscall(libc.Long(_NR[name]), *arguments), name)
