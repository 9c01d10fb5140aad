"""A config.json with every field of the runtime-spec for Linux, for tests that change one field at a time."""

from __future__ import annotations

import copy
import re
from typing import Any

MISSING = object()
"""For `changed`: the field is taken away."""

_STEP = re.compile(r"\[(\d+)\]|\.?([^.\[\]]+)")


def _mappings() -> list[dict[str, int]]:
    return [{"containerID": 0, "hostID": 100000, "size": 65536}]


FULL: dict[str, Any] = {
    "ociVersion": "1.2.0",
    "root": {"path": "rootfs", "readonly": True},
    "hostname": "web",
    "domainname": "example.org",
    "annotations": {"org.example.key": "value"},
    "process": {
        "terminal": True,
        "consoleSize": {"height": 25, "width": 80},
        "user": {"uid": 1, "gid": 2, "umask": 18, "additionalGids": [5, 6]},
        "args": ["sh", "-c", "echo ü"],
        "env": ["PATH=/bin", "A=b=c", "EMPTY="],
        "cwd": "/tmp",
        "capabilities": {
            name: ["CAP_KILL", "CAP_CHOWN"] for name in ("bounding", "effective", "permitted", "inheritable", "ambient")
        },
        "rlimits": [
            {"type": "RLIMIT_NOFILE", "soft": 10, "hard": 20},
            {"type": "RLIMIT_CORE", "soft": (1 << 64) - 1, "hard": (1 << 64) - 1},
        ],
        "noNewPrivileges": True,
        "apparmorProfile": "unconfined",
        "selinuxLabel": "",
        "oomScoreAdj": -999,
        "scheduler": {"policy": "SCHED_FIFO", "nice": 0, "priority": 7, "flags": ["SCHED_FLAG_RESET_ON_FORK"]},
        "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 4},
        "execCPUAffinity": {"initial": "0", "final": "0-3,7"},
    },
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/data", "type": "none", "source": "/srv", "options": ["rbind", "rro", "rslave"]},
        {
            "destination": "/mapped",
            "type": "bind",
            "source": "data",
            "options": ["bind", "idmap"],
            "uidMappings": _mappings(),
            "gidMappings": _mappings(),
        },
    ],
    "hooks": {
        kind: [{"path": "/bin/true", "args": ["true"], "env": ["A=b"], "timeout": 5}]
        for kind in ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
    },
    "linux": {
        "namespaces": [
            {"type": "pid"},
            {"type": "network", "path": "/run/netns/other"},
            *({"type": kind} for kind in ("mount", "ipc", "uts", "user", "cgroup", "time")),
        ],
        "uidMappings": _mappings(),
        "gidMappings": _mappings(),
        "timeOffsets": {"monotonic": {"secs": -5, "nanosecs": 1}, "boottime": {"secs": 7}},
        "devices": [
            {"type": "c", "path": "/dev/fuse", "major": 10, "minor": 229, "fileMode": 438, "uid": 0, "gid": 0},
            {"type": "p", "path": "/pipe"},
        ],
        "cgroupsPath": "/tests/web",
        "sysctl": {"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1", "fs/mqueue/msg_max": "5"},
        "rootfsPropagation": "rslave",
        "maskedPaths": ["/proc/kcore"],
        "readonlyPaths": ["/proc/sys"],
        "mountLabel": "",
        "personality": {"domain": "LINUX32", "flags": []},
        "memoryPolicy": {"mode": "MPOL_BIND", "nodes": "0-1", "flags": ["MPOL_F_STATIC_NODES"]},
        "netDevices": {"eth0": {"name": "inner%d"}, "eth1": {}},
        "resources": {
            "devices": [
                {"allow": False, "access": "rwm"},
                {"allow": True, "type": "c", "major": 1, "minor": -1, "access": "rw"},
            ],
            "memory": {
                "limit": 1 << 20,
                "reservation": 1 << 19,
                "swap": 1 << 21,
                "kernel": -1,
                "kernelTCP": -1,
                "swappiness": 0,
                "disableOOMKiller": False,
                "useHierarchy": True,
                "checkBeforeUpdate": True,
            },
            "cpu": {
                "shares": 1024,
                "quota": 50000,
                "burst": 1000,
                "period": 100000,
                "realtimeRuntime": 950000,
                "realtimePeriod": 1000000,
                "cpus": "0-1",
                "mems": "0",
                "idle": 0,
            },
            "pids": {"limit": 0},
            "blockIO": {
                "weight": 10,
                "leafWeight": 10,
                "weightDevice": [{"major": 8, "minor": 0, "weight": 500, "leafWeight": 300}],
                **{
                    f"throttle{way}Device": [{"major": 8, "minor": 0, "rate": 600}]
                    for way in ("ReadBps", "WriteBps", "ReadIOPS", "WriteIOPS")
                },
            },
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}, {"pageSize": "64KB", "limit": 1}],
            "network": {"classID": 1, "priorities": [{"name": "eth0", "priority": 5}]},
            "rdma": {"mlx5_1": {"hcaHandles": 3, "hcaObjects": 4}},
            "unified": {"memory.high": "max"},
        },
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 38,
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "listenerPath": "/run/agent.sock",
            "listenerMetadata": "opaque",
            "syscalls": [
                {"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"},
                {
                    "names": ["personality"],
                    "action": "SCMP_ACT_TRACE",
                    "errnoRet": 5,
                    "args": [{"index": 0, "value": (1 << 64) - 1, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}],
                },
                {"names": ["mount"], "action": "SCMP_ACT_NOTIFY"},
            ],
        },
    },
}


def steps(path: str) -> list[str | int]:
    """``a.b[0].c`` as keys and indices."""
    return [int(index) if index else name for index, name in _STEP.findall(path)]


def changed(path: str, value: object, config: dict[str, Any] = FULL) -> dict[str, Any]:
    """A copy of `config` with the field at `path` replaced, or taken away if `value` is MISSING."""
    config = copy.deepcopy(config)
    at: Any = config
    *parents, last = steps(path)
    for step in parents:
        at = at[step]
    if value is MISSING:
        del at[last]
    else:
        at[last] = value
    return config


def value_at(path: str) -> Any:
    """The value at `path` in FULL."""
    at: Any = FULL
    for step in steps(path):
        at = at[step]
    return at


def paths(value: object, prefix: str = "") -> list[str]:
    """The path of every field below `value`, outer ones first."""
    found = []
    if isinstance(value, dict):
        for name, field in value.items():
            path = f"{prefix}.{name}".lstrip(".")
            found += [path, *paths(field, path)]
    elif isinstance(value, list):
        for index, item in enumerate(value):
            path = f"{prefix}[{index}]"
            found += [path, *paths(item, path)]
    return found
