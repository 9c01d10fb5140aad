"""The OCI config of a program in a guest: that of a container, without what is the host's."""

from __future__ import annotations

import os
import resource
from typing import Any, Final

from insula.machine.protocol import DISKS, ETC
from insula.model.disks import FurtherDisk

_KEPT: Final = ("pid", "mount", "ipc", "uts", "cgroup")
_OF_HOSTS: Final = ("uidMappings", "gidMappings", "seccomp", "resources", "cgroupsPath")


def in_guest(made: dict[str, Any], etc: str) -> dict[str, Any]:
    """The config from that of a container, whose files of /etc are in `etc`."""
    linux = {name: value for name, value in made["linux"].items() if name not in _OF_HOSTS}
    linux |= {"namespaces": [{"type": kind} for kind in _KEPT], "sysctl": {}}
    process = {**made["process"], "rlimits": [_files()]}
    mounts = [_mount_in_guest(mount, etc) for mount in made["mounts"]]
    return {**made, "process": process, "linux": linux, "mounts": mounts}


def mount_of(each: FurtherDisk) -> dict[str, Any]:
    """The mount of a further disk, which the agent has mounted before."""
    options = ["bind", "nosuid", "nodev"]
    return {"destination": each.mount, "type": "bind", "source": f"{DISKS}/{each.name}", "options": options}


def _files() -> dict[str, Any]:
    """How many files a program may have open (RLIMIT_NOFILE): as many as in a container, which has insulad's limit. The
    guest's kernel would let it have 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {"type": "RLIMIT_NOFILE", "soft": soft, "hard": hard}


def _mount_in_guest(mount: dict[str, Any], etc: str) -> dict[str, Any]:
    """A mount whose source is a file that the agent writes, if it is one of the host's."""
    source = str(mount.get("source", ""))
    return {**mount, "source": f"{ETC}/{os.path.basename(source)}"} if os.path.dirname(source) == etc else mount
