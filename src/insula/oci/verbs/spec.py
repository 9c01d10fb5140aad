"""``spec``: write a template of config.json: a confined shell on the root file system in ``rootfs``."""

from __future__ import annotations

import os

from insula.model.errors import Conflict, Failed
from insula.oci.state import OCI_VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from insula.oci.options import VerbArguments

_CAPABILITIES = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
_MASKED = "acpi asound kcore keys latency_stats timer_list timer_stats sched_debug scsi"
_READ_ONLY = "bus fs irq sys sysrq-trigger"


def run(arguments: VerbArguments) -> int:
    import json

    path = os.path.join(arguments.bundle or ".", "config.json")
    config = default(rootless=arguments.rootless)
    try:
        with open(path, "x") as file:
            file.write(json.dumps(config, indent=4) + "\n")
    except FileExistsError:
        raise Conflict(f"{path} exists", "remove it first") from None
    except OSError as error:
        raise Failed(f"{path} can't be written: {error.strerror}", "see --bundle") from None
    return 0


def default(*, rootless: bool = False) -> dict[str, Any]:
    """The config; `rootless` is for users other than root: a user namespace, and no limits."""
    namespaces = ["pid", "network", "ipc", "uts", "mount", "cgroup"]
    config: dict[str, Any] = {
        "ociVersion": OCI_VERSION,
        "process": {
            "terminal": True,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), _CAPABILITIES),
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "insula",
        "mounts": _mounts(rootless),
        "linux": {
            "namespaces": [{"type": kind} for kind in namespaces],
            "maskedPaths": [*(f"/proc/{name}" for name in _MASKED.split()), "/sys/firmware"],
            "readonlyPaths": [f"/proc/{name}" for name in _READ_ONLY.split()],
        },
    }
    if rootless:
        # the caller is root inside, and no other IDs are mapped
        config["linux"]["namespaces"] = [{"type": kind} for kind in namespaces if kind != "network"] + [
            {"type": "user"}
        ]
        config["linux"]["uidMappings"] = [{"containerID": 0, "hostID": os.geteuid(), "size": 1}]
        config["linux"]["gidMappings"] = [{"containerID": 0, "hostID": os.getegid(), "size": 1}]
    else:
        config["linux"]["resources"] = {"devices": [{"allow": False, "access": "rwm"}]}
    return config


def _mounts(rootless: bool) -> list[dict[str, Any]]:
    def mount(at: str, kind: str, source: str, *options: str) -> dict[str, Any]:
        return {"destination": at, "type": kind, "source": source, "options": list(options)}

    confined = ("nosuid", "noexec", "nodev")
    tty = () if rootless else ("gid=5",)  # the group of terminals, which is not mapped for a single user
    sysfs = mount("/sys", "none", "/sys", "rbind", *confined, "ro")  # a new one would need the network namespace
    return [
        mount("/proc", "proc", "proc"),
        mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        mount("/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", *tty),
        mount("/dev/shm", "tmpfs", "shm", *confined, "mode=1777", "size=65536k"),
        mount("/dev/mqueue", "mqueue", "mqueue", *confined),
        sysfs if rootless else mount("/sys", "sysfs", "sysfs", *confined, "ro"),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", *confined, "relatime", "ro"),
    ]
