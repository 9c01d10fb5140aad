"""`insula explain` for containers: their isolation, read from /proc and control groups."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from insula.control.instances.drivers.base import Running
from insula.kernel import process
from insula.kernel.capabilities import to_names
from insula.kernel.cgroups import Cgroup
from insula.model.views import Namespace

_KINDS = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")  # namespaces(7)
_SECCOMP = {"0": "none", "1": "strict", "2": "filter"}


def namespaces(pid: int) -> list[Namespace]:
    """The namespaces of a process. `shared`: it is the same as insulad's own, which is the host's."""
    found, directory = [], process.directory(pid)
    for kind in _KINDS:
        with suppress(FileNotFoundError, ProcessLookupError):
            inode = os.stat(f"{directory}/ns/{kind}").st_ino
            found.append(Namespace(kind=kind, inode=inode, shared=inode == os.stat(f"/proc/self/ns/{kind}").st_ino))
    return found


def with_instances(own: Sequence[Namespace], near: Mapping[str, Running]) -> list[Namespace]:
    """The namespaces, each with the names of the other instances in it."""
    inodes = [(name, {n.inode for n in namespaces(running.pid)}) for name, running in near.items()]
    return [
        msgspec.structs.replace(each, instances=[name for name, theirs in inodes if each.inode in theirs])
        for each in own
    ]


def uid_map(pid: int) -> str | None:
    return _read(f"/proc/{pid}/uid_map")


def security(pid: int) -> dict[str, str]:
    """Capabilities, seccomp mode and no_new_privs of a process, from proc_pid_status(5)."""
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


def pressure(group: Cgroup) -> dict[str, str]:
    """The first lines of the group's pressure files (PSI), by file name. Cgroup version 2 only."""
    found = {}
    for directory in group.directories().values():
        for name in ("cpu.pressure", "memory.pressure", "io.pressure"):
            if text := _read(f"{directory}/{name}"):
                found[name] = text.splitlines()[0]
    return found


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(errors="replace").strip()  # status has the program's name, which may be any bytes
    except OSError:
        return None
