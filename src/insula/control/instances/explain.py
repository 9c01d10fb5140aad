"""What makes an instance isolated, read from where it really is: /proc, control groups, the fabric's read-back."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from insula.control.instances.processes import views
from insula.control.instances.supervisor import Member, Supervisor
from insula.kernel import process
from insula.kernel.capabilities import to_names
from insula.kernel.cgroups import Cgroup
from insula.model.errors import InsulaError
from insula.model.views import Explanation, Layer, Namespace

_KINDS = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")  # namespaces(7)
_SECCOMP = {"0": "none", "1": "strict", "2": "filter"}


async def explain(supervisor: Supervisor, member: Member) -> Explanation:
    """Everything that is known; what needs a running process is empty when it doesn't run."""
    context, instance = supervisor.context, member.instance
    group = Cgroup(supervisor.launcher.cgroup(instance))
    parent = Cgroup(os.path.dirname(group.path))
    pid = member.status.pid if member.active else None
    device = rules = None
    installed: dict[str, object] | None = None
    if instance.port:
        port = instance.port
        with suppress(InsulaError):
            found = await context.fabric_call(instance.tenant, context.fabric.installed, member.tenant)
            here = next((p for p in found.ports if p.index == port.index), None)
            if here:
                device, installed = here.device, msgspec.to_builtins(here)
                rules = found.rules
    near = _near(supervisor, member)

    def read() -> Explanation:  # files of /proc: as many as it has processes
        there = group.exists()
        return Explanation(
            instance=instance,
            status=member.status,
            processes=list(views(context.runtime, member)) if pid else [],
            namespaces=_shared(near, namespaces(pid)) if pid else [],
            uid_map=_read(f"/proc/{pid}/uid_map") if pid else None,
            cgroups=group.directories() if there else {},
            limits=group.values() if there else {},
            tenant_limits=parent.values() if there else {},
            security=security(pid) if pid else {},
            layers=_layers(supervisor, member),
            upper=str(supervisor.launcher.directory(instance.id).upper),
            device=device,
            installed=installed,
            rules=rules,
            health=member.monitor.health if member.monitor else None,
            pressure=_pressure(group) if pid else {},
        )

    return await asyncio.to_thread(read)


def _near(supervisor: Supervisor, member: Member) -> list[tuple[str, int]]:
    """Names and PIDs of the instances that may share a namespace with it: those that join another's, and the joined."""
    others = [m for m in supervisor.of(member.instance.tenant) if m.status.pid and m is not member]
    joined = {m.instance.spec.pid_of for m in (*others, member)}
    near = [m for m in others if m.instance.spec.pid_of or m.instance.name in joined]
    return [(m.instance.name, m.status.pid or 0) for m in near]


def _shared(near: Sequence[tuple[str, int]], own: list[Namespace]) -> list[Namespace]:
    """The namespaces with the instances that are in them too."""
    inodes = [(name, {n.inode for n in namespaces(pid)}) for name, pid in near]
    return [
        msgspec.structs.replace(each, instances=[name for name, theirs in inodes if each.inode in theirs])
        for each in own
    ]


def _pressure(group: Cgroup) -> dict[str, str]:
    """How long processes of the group had to wait lately; version 2 only."""
    found = {}
    for directory in group.directories().values():
        for name in ("cpu.pressure", "memory.pressure", "io.pressure"):
            if text := _read(f"{directory}/{name}"):
                found[name] = text.splitlines()[0]
    return found


def namespaces(pid: int) -> list[Namespace]:
    """The namespaces of a process, compared with our own, which are the host's."""
    found, directory = [], process.directory(pid)
    for kind in _KINDS:
        with suppress(FileNotFoundError, ProcessLookupError):
            inode = os.stat(f"{directory}/ns/{kind}").st_ino
            found.append(Namespace(kind=kind, inode=inode, shared=inode == os.stat(f"/proc/self/ns/{kind}").st_ino))
    return found


def security(pid: int) -> dict[str, str]:
    """Capabilities, seccomp and no_new_privs of a process, as proc_pid_status(5) has them."""
    text = _read(f"/proc/{pid}/status") or ""
    fields = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    found = {}
    for name, field in (("capabilities", "CapEff"), ("bounding capabilities", "CapBnd"), ("ambient", "CapAmb")):
        if field in fields:
            found[name] = " ".join(to_names(int(fields[field], 16))) or "none"
    if "Seccomp" in fields:
        found["seccomp"] = _SECCOMP.get(fields["Seccomp"].strip(), fields["Seccomp"])
    if "NoNewPrivs" in fields:
        found["no_new_privs"] = "yes" if fields["NoNewPrivs"].strip() == "1" else "no"
    return found


def _layers(supervisor: Supervisor, member: Member) -> list[Layer]:
    """Top-most first, as overlayfs stacks them."""
    found = []
    for digest in reversed(member.instance.layers):
        with suppress(InsulaError):
            path = supervisor.context.images.lower([digest])[0]
            found.append(Layer(digest=digest, path=str(path)))
    return found


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(errors="replace").strip()  # proc_pid_status(5) has the name as it is
    except OSError:
        return None
