"""The container of a machine's shim and QEMU: namespaces of its own, an ordinary user, nothing that can be written."""

from __future__ import annotations

from typing import Any, Final

from insula.control.instances.drivers.container import seccomp_default, spec
from insula.machine.qemu import root
from insula.model.objects import IDS_PER_TENANT, Resources

OVERHEAD: Final = 192 << 20
"""Bytes of memory of QEMU and the shim beside the guest's, of which QEMU has up to 53 MiB, its translated code 32 MiB
and each program that is executed in the guest some 10."""
_PROCESSES: Final = 256  # and threads
_USER: Final = {"uid": 1, "gid": 1, "umask": 0o077}
_SETS = ("bounding", "effective", "permitted", "inheritable", "ambient")
_NAMESPACES = ("user", "pid", "mount", "network", "ipc", "uts", "cgroup")
_PROC = {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]}
_DEV = {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]}
_PTS = {
    "destination": "/dev/pts",
    "type": "devpts",
    "source": "devpts",
    "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", f"max={spec.TERMINALS}"],
}


def config(id_base: int, cgroup: str, limits: dict[str, Any], *, terminal: bool) -> dict[str, Any]:
    """The OCI config of the container. `limits` is `linux.resources`."""
    ids = [{"containerID": 0, "hostID": id_base, "size": IDS_PER_TENANT}]
    return {
        "ociVersion": spec.OCI_VERSION,
        "hostname": "machine",
        "root": {"path": "rootfs", "readonly": True},
        "process": {**process([root.SHIM], terminal=terminal), "oomScoreAdj": 0},
        "mounts": [dict(each) for each in (_PROC, _DEV, _PTS)],
        "linux": {
            "namespaces": [{"type": kind} for kind in _NAMESPACES],
            "uidMappings": ids,
            "gidMappings": ids,
            "cgroupsPath": f"/{cgroup}",
            "resources": limits,
            "seccomp": seccomp_default.profile([]),
        },
    }


def process(arguments: list[str], *, terminal: bool) -> dict[str, Any]:
    """`process` of an OCI config, for a program in the container."""
    return {
        "terminal": terminal,
        "user": dict(_USER),
        "args": arguments,
        "env": [],
        "cwd": "/",
        "capabilities": {each: [] for each in _SETS},
        "noNewPrivileges": True,
    }


def resources(limits: Resources) -> Resources:
    """The limits of the container: the guest's memory, and what QEMU needs beside it. The guest counts its processes
    itself."""
    memory = None if limits.memory is None else limits.memory + OVERHEAD
    return Resources(cpus=limits.cpus, memory=memory, pids=_PROCESSES)
