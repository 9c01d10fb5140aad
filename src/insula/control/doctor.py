"""What this host has and lacks, and what follows from it. Looked at by doing, where looking alone could be wrong."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from insula.control.settings import Settings
from insula.kernel import cgroups
from insula.model.units import format_size
from insula.model.views import Check

State = Literal["ok", "degraded", "missing"]
_MIN_KERNEL = (6, 1)
_LOW_DISK = 1 << 30
_V1_NEEDED = ("cpu", "memory", "pids", "devices", "freezer")
_V2_NEEDED = ("cpu", "memory", "pids", "io")
_PROGRAMS = {
    "dnsmasq": ("names of instances can't be resolved", "missing"),
    "nft": ("`nft list ruleset` is not there for people to look with", "degraded"),
    "tini": ("`insula run --init` is refused", "degraded"),
    "skopeo": ("`insula image pull` and `push` are refused", "degraded"),
    "debootstrap": ("`insula image build-base` is refused", "degraded"),
    "busybox": ("the image busybox:latest can't be made", "degraded"),
}


def examine(settings: Settings) -> list[Check]:
    """Every check, in the order in which they matter."""
    return list(_checks(settings))


def _checks(settings: Settings) -> Iterator[Check]:
    yield _kernel()
    yield _root()
    yield _cgroups()
    yield _limit("user namespaces", "/proc/sys/user/max_user_namespaces", "no instance can be launched")
    yield _limit("network namespaces", "/proc/sys/user/max_net_namespaces", "no tenant can be made")
    yield _filesystem("overlay", "no instance can be launched")
    yield _library("nftables", "libnftables.so.1", "no tenant can be made")
    yield _library("seccomp", "libseccomp.so.2", "no instance can be launched")
    yield _ipv6()
    for program, (consequence, state) in _PROGRAMS.items():
        yield _program(program, consequence, "missing" if state == "missing" else "degraded")
    yield _resource()
    yield _disk(settings)


def _check(name: str, good: bool, detail: str, consequence: str, otherwise: State = "missing") -> Check:
    return Check(name=name, state="ok" if good else otherwise, detail=detail, consequence=None if good else consequence)


def _kernel() -> Check:
    release = platform.release()
    numbers = tuple(int(part) for part in release.split("-")[0].split("+")[0].split(".")[:2] if part.isdigit())
    return _check("kernel", numbers >= _MIN_KERNEL, release, "Insula is made for Linux 6.1 and later", "degraded")


def _root() -> Check:
    return _check("root", os.geteuid() == 0, f"user {os.geteuid()}", "insulad can't make namespaces and mounts")


def _cgroups() -> Check:
    try:
        tree = cgroups.detect()
    except OSError as error:
        return _check("cgroups", False, str(error), "nothing can be limited, so nothing is launched")
    if tree.unified:
        path = Path(tree.unified) / "cgroup.controllers"
        there = set(path.read_text().split()) if path.exists() else set()
        lacking = [name for name in _V2_NEEDED if name not in there]
        detail = f"version 2 at {tree.unified}"
    elif tree.controllers:
        lacking = [name for name in _V1_NEEDED if name not in tree.controllers]
        detail = f"version 1: {' '.join(sorted(tree.controllers))}"
    else:
        return _check("cgroups", False, "not mounted", "nothing can be limited, so nothing is launched")
    detail += f"; missing: {' '.join(lacking)}" if lacking else ""
    return _check("cgroups", not lacking, detail, f"limits of {', '.join(lacking)} are not enforced")


def _limit(name: str, path: str, consequence: str) -> Check:
    try:
        value = int(Path(path).read_text())
    except (OSError, ValueError):
        return _check(name, False, f"{path} is not there", consequence)
    return _check(name, value > 0, f"at most {value}", f"{consequence}: raise {path}")


def _filesystem(name: str, consequence: str) -> Check:
    known = name in Path("/proc/filesystems").read_text().split()
    module = Path(f"/lib/modules/{platform.release()}/kernel/fs/{name}fs").exists()
    return _check(f"{name} file system", known or module, "there" if known else "as a module", consequence)


def _library(name: str, soname: str, consequence: str) -> Check:
    try:
        ctypes.CDLL(soname)
    except OSError:
        return _check(name, False, f"{soname} is not there", consequence)
    return _check(name, True, soname, consequence)


def _ipv6() -> Check:
    there = Path("/proc/sys/net/ipv6").exists()
    return _check("IPv6", there, "there" if there else "not in this kernel", "networks have IPv4 only", "degraded")


def _program(name: str, consequence: str, otherwise: State) -> Check:
    path = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    return _check(name, path is not None, path or "not installed", consequence, otherwise)


def _resource() -> Check:
    text = Path("/proc/self/status").read_text()
    effective = int(next(line.split()[1] for line in text.splitlines() if line.startswith("CapEff")), 16)
    there = bool(effective >> 24 & 1)  # CAP_SYS_RESOURCE, linux/capability.h
    detail = "CAP_SYS_RESOURCE" if there else "no CAP_SYS_RESOURCE"
    return _check("rlimits", there, detail, "`--ulimit` can't go above the daemon's own hard limits", "degraded")


def _disk(settings: Settings) -> Check:
    usage = shutil.disk_usage(settings.root)
    detail = f"{format_size(usage.free)} free at {settings.root}"
    return _check("disk", usage.free > _LOW_DISK, detail, "images and instances may not fit", "degraded")
