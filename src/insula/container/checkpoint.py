"""The arguments of criu for a container: its resources that are outside of the checkpoint, by name.

There are two lists of arguments (kernel/criu.py), for dump and for restore. Each external resource has a name that is
in both:

    bind mounts              mnt[PATH INSIDE]        after: the source in the bundle's config
    covers of masked files   mnt[PATH INSIDE]        after: /dev/null
    device nodes             mnt[PATH INSIDE]        after: the host's device, where they were bound rather than made
    namespaces by path       net[INODE], pid[INODE]  after: a descriptor of the namespace in the config
    standard streams         pipe:[INODE], file[…]   after: the caller's own; so a container may change its parent

The names are stored beside criu's images (``insula.json``), because they can't be read after the container's end.
"""

from __future__ import annotations

import os
import re

from insula.model.cpython import dumps, loads
from insula.model.errors import Failed, Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

NAMES = "insula.json"
_KINDS = {"network": "net", "pid": "pid"}
"""Namespaces that criu takes from outside, and its words for them."""


def dump_arguments(pid: int, config: dict[str, Any], images: str) -> list[str]:
    """The arguments of `criu dump` for the container whose PID 1 is `pid`; writes the names into directory `images`."""
    if config.get("process", {}).get("terminal"):
        raise Unavailable("a container with a terminal can't be checkpointed", "run it without one")
    mounts = _external_mounts(pid)
    namespaces = {kind: os.stat(f"/proc/{pid}/ns/{kind}").st_ino for kind, _ in _joined(config)}
    streams = _streams(pid)
    with open(f"{images}/{NAMES}", "w", encoding="utf-8") as file:
        file.write(dumps({"mounts": mounts, "namespaces": namespaces, "streams": streams}))
    arguments = ["--tree", str(pid), "--images-dir", images]
    for inside in mounts:
        arguments += ["--external", f"mnt[{inside}]:{inside}"]
    for kind, inode in namespaces.items():
        arguments += ["--external", f"{kind}[{inode}]:{kind}"]
    for name in streams.values():
        if name.startswith("file["):
            arguments += ["--external", name]
    return arguments


def restore_arguments(config: dict[str, Any], images: str) -> tuple[list[str], list[int]]:
    """The arguments of `criu restore`, and the descriptors that it must inherit; the caller closes those above 2."""
    try:
        with open(f"{images}/{NAMES}", encoding="utf-8") as file:
            names = loads(file.read())
    except (OSError, ValueError) as error:
        raise Failed(
            f"{images} is no checkpoint of insula-oci: {error}", "name the --image-path of `checkpoint`"
        ) from None
    sources = {mount["destination"]: mount.get("source", "") for mount in config.get("mounts", [])}
    arguments = ["--images-dir", images]
    for inside, source in names["mounts"].items():
        arguments += ["--external", f"mnt[{inside}]:{sources.get(inside) or source}"]
    keep = []
    for fd, name in names["streams"].items():
        arguments += ["--inherit-fd", f"fd[{fd}]:{name}"]
        keep.append(int(fd))
    for kind, path in _joined(config):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        arguments += ["--inherit-fd", f"fd[{fd}]:{kind}"]
        keep.append(fd)
    return arguments, keep


def _joined(config: dict[str, Any]) -> list[tuple[str, str]]:
    """(criu's word, path) of each namespace that is named by its path; Unavailable for kinds that criu can't join."""
    found = []
    for namespace in config["linux"].get("namespaces", []):
        if not namespace.get("path"):
            continue
        if namespace["type"] not in _KINDS:
            what = f"a container that joined a namespace of type {namespace['type']} can't be checkpointed"
            raise Unavailable(what, "give it one of its own")
        found.append((_KINDS[namespace["type"]], namespace["path"]))
    return found


def _streams(pid: int) -> dict[str, str]:
    """criu's names of the standard streams that lead out of the container: pipes, and files of other mounts."""
    own = {row.number for row in _mounts(pid)}
    found = {}
    for fd in range(3):
        try:
            path = os.readlink(f"/proc/{pid}/fd/{fd}")
            inode = os.stat(f"/proc/{pid}/fd/{fd}").st_ino
            with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii") as file:
                mount = next(int(line.split()[1]) for line in file if line.startswith("mnt_id:"))
        except FileNotFoundError:  # it is closed
            continue
        if path.startswith("pipe:["):
            found[str(fd)] = path
        elif path.startswith("/") and mount not in own:
            found[str(fd)] = f"file[{mount:x}:{inode:x}]"
    return found


def _external_mounts(pid: int) -> dict[str, str]:
    """The destinations of bind mounts from the host in the container, and their sources on the host.

    A bind mount shows a part of a file system that is not the container's: its root is not "/", and no mount of the
    container shows "/" of the same device. criu knows control groups by itself, seen through a namespace or not.
    """
    rows = _mounts(pid)
    whole = {row.device for row in rows if row.part == "/" and row.where != "/"}
    apart = {"cgroup", "cgroup2"} if _has_cgroup_namespace(pid) else set()
    return {
        row.where: _on_host(row)
        for row in rows
        if row.where != "/" and row.device not in whole and row.kind not in {"nsfs", *apart}
    }


class _Mount:
    """A line of proc_pid_mountinfo(5): `part` of the file system on `device` is seen at `where`."""

    def __init__(self, line: str) -> None:
        left, right = line.split(" - ", 1)
        fields = left.split()
        self.number = int(fields[0])
        self.device, self.part, self.where = fields[2], _decode(fields[3]), _decode(fields[4])
        self.kind = right.split()[0]


def _mounts(pid: int | str) -> list[_Mount]:
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return [_Mount(line) for line in file]


def _on_host(mount: _Mount) -> str:
    """A path of the host that leads to the same file."""
    for own in _mounts("self"):
        if own.device == mount.device and (own.part == "/" or f"{mount.part}/".startswith(f"{own.part}/")):
            inner = mount.part if own.part == "/" else mount.part[len(own.part) :]
            return f"{own.where.rstrip('/')}{inner}" or "/"
    return mount.part


def _has_cgroup_namespace(pid: int) -> bool:
    return os.stat(f"/proc/{pid}/ns/cgroup").st_ino != os.stat("/proc/self/ns/cgroup").st_ino


def _decode(path: str) -> str:
    """Decode the octal escapes of mountinfo, as in ``\\040``."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
