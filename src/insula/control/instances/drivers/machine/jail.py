"""The container of a machine's shim and QEMU: namespaces of its own, an ordinary user, nothing that can be written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from insula.container.service.client import Launch
from insula.control.instances.drivers.container import spec
from insula.control.instances.drivers.machine import seccomp
from insula.machine.qemu import root
from insula.model.objects import IDS_PER_TENANT, Resources, Tenant

OVERHEAD: Final = 160 << 20
"""Bytes of memory of QEMU and the shim beside the guest's. Measured with a guest of 256 MiB that has filled its memory:
QEMU had 96 MiB more with all of its translated code (64 MiB), and the shim 10; each program that is executed in the
guest has a process of some 10 MiB, which is killed before QEMU is."""
KVM: Final = {"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}
"""The device of KVM: with it QEMU makes processors and sets what memory they see, which is its own."""
_PROCESSES: Final = 256  # and threads
_USER: Final = {"uid": 1, "gid": 1, "umask": 0o077}
_SETS = ("bounding", "effective", "permitted", "inheritable", "ambient")
_NAMESPACES = ("user", "pid", "mount", "network", "ipc", "uts", "cgroup")
_PROC = {"destination": "/proc", "type": "proc", "source": "proc", "options": ["ro", "nosuid", "noexec", "nodev"]}
_DEV = {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]}
_PTS = {
    "destination": "/dev/pts",
    "type": "devpts",
    "source": "devpts",
    "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", f"max={spec.TERMINALS}"],
}


def launch(
    tenant: Tenant, program: Launch, base: Path, limits: dict[str, Any], devices: Sequence[dict[str, Any]] = ()
) -> Launch:
    """The request for the container, in place of that for the program; for the others see `config`. `base` is its root
    file system."""
    made = config(tenant.id_base, program.cgroup, limits, terminal=program.tty, devices=devices)
    return program._replace(config=made, lower=[str(base)], volatile=True)


def config(
    id_base: int,
    cgroup: str,
    limits: dict[str, Any],
    *,
    terminal: bool,
    devices: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The OCI config of the container. `limits` is `linux.resources`; `devices` are there and may be opened."""
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
            "devices": [{**each, "fileMode": 0o666} for each in devices],
            "resources": {
                **limits,
                "devices": [*limits["devices"], *(allowed(each) for each in devices)],
            },
            "seccomp": seccomp.profile(),
        },
    }


def allowed(device: dict[str, Any]) -> dict[str, Any]:
    """The rule of a control group that lets a device be opened."""
    numbers = {name: device[name] for name in ("type", "major", "minor")}
    return {"allow": True, "access": "rw", **numbers}


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


def of_shim() -> Resources:
    """The limits of a container in which there is no QEMU."""
    return Resources(memory=OVERHEAD, pids=_PROCESSES)


def resources(limits: Resources, *, copy: bool) -> Resources:
    """The limits of the container: the guest's memory, and what QEMU needs beside it. The guest counts its processes
    itself.

    The memory of a template is a file with holes. Where the `copy` of a template is the first to write into a hole, the
    kernel also makes the page of the file, for all further copies, and charges it to this container (shmem, which can't
    be reclaimed). So a copy may be charged as much again.
    """
    memory = None if limits.memory is None else limits.memory * (2 if copy else 1) + OVERHEAD
    return Resources(cpus=limits.cpus, memory=memory, pids=_PROCESSES)
