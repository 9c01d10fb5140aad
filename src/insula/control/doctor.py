"""`insula doctor`: the checks of this host, with the consequence of each failed check and a hint.

`insula.kernel.features` tries the features of the kernel. This module explains each failure, and checks programs,
libraries, disk space, and settings of the host that conflict with Insula.
"""

from __future__ import annotations

import ctypes
import grp
import os
import platform
import pwd
import resource
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from insula.control.instances.drivers.machine import checks as machines
from insula.control.tenants import FIRST_ID, MAX_TENANTS
from insula.kernel import capabilities, features, nftables
from insula.model.errors import InsulaError
from insula.model.objects import IDS_PER_TENANT
from insula.model.units import format_rate, format_size
from insula.model.views import Check
from insula.network import link
from insula.settings import OPERATORS, Settings

CheckState = Literal["ok", "degraded", "missing", "unknown"]


class _Meaning(NamedTuple):
    """A check's result when it fails: its state, the consequence, and a hint."""

    name: str
    state: CheckState
    consequence: str
    hint: str


_KERNEL_HINT = "use a stock kernel of Linux 6.1 or later"
_FEATURES = {
    "user_namespaces": _Meaning(
        "user namespaces", "missing", "no instance can be launched", "raise the sysctl user.max_user_namespaces"
    ),
    "namespaces": _Meaning("namespaces", "missing", "no instance can be launched", _KERNEL_HINT),
    "control_groups": _Meaning(
        "cgroups", "missing", "nothing can be limited, so nothing is launched", "mount the control group file systems"
    ),
    "overlay": _Meaning(
        "overlay", "missing", "no instance can be launched from here", "put the root directory on ext4, xfs or btrfs"
    ),
    "idmapped_layers": _Meaning(
        "idmapped layers",
        "missing",
        "no instance can be launched from here",
        "put the root directory on ext4, xfs or btrfs",
    ),
    "seccomp": _Meaning("seccomp", "missing", "no instance can be launched", _KERNEL_HINT),
    "process_descriptors": _Meaning("pidfds and clone3", "missing", "no instance can be launched", _KERNEL_HINT),
    "exit_information": _Meaning(
        "exit information",
        "degraded",
        "the exit status of an instance that ends while its monitor is dead is lost",
        "Linux 6.15 and later keep it",
    ),
    "landlock": _Meaning(
        "landlock", "degraded", "instances can't restrict themselves with it", "boot with landlock in the list lsm="
    ),
    "links": _Meaning(
        "bridge, veth, vxlan", "missing", "no network can be made", "load the modules bridge, veth and vxlan"
    ),
    "packet_filter": _Meaning(
        "nftables", "missing", "no network can be made", "install libnftables1; the kernel needs nf_tables"
    ),
    "bridge_connections": _Meaning(
        "conntrack on bridges", "missing", "no network can be made", "load the module br_netfilter"
    ),
    "virtual_machines": _Meaning(
        "KVM", "degraded", "virtual machines are emulated, which is slow", "enable virtualization, or nested, for KVM"
    ),
    "open_vswitch": _Meaning(
        "openvswitch", "degraded", "the ovn fabric can't be used here", "use a kernel with the module openvswitch"
    ),
    "pressure": _Meaning("pressure stalls", "degraded", "stats show no pressure", "boot with psi=1"),
    "checkpoint": _Meaning(
        "CRIU", "degraded", "containers can't be checkpointed", "install a criu that fits the kernel"
    ),
}
_PROGRAMS = {
    "dnsmasq": _Meaning("dnsmasq", "missing", "names of instances can't be resolved", "apt-get install dnsmasq-base"),
    "nft": _Meaning("nft", "degraded", "rules can't be looked at by people", "apt-get install nftables"),
    "tini": _Meaning("tini", "degraded", "`insula run --init` is refused", "apt-get install tini"),
    "skopeo": _Meaning("skopeo", "degraded", "`insula image pull` and `push` are refused", "apt-get install skopeo"),
    "debootstrap": _Meaning(
        "debootstrap", "degraded", "`insula image build-base` is refused", "apt-get install debootstrap"
    ),
    "busybox": _Meaning(
        "busybox", "degraded", "the image busybox:latest can't be made", "apt-get install busybox-static"
    ),
}
_MIN_KERNEL = (6, 1)
_LOW_DISK = 1 << 30
_LOW_FILES = 65536
_FAST_LINK = 25_000_000_000  # bits a second
_SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def examine(settings: Settings) -> list[Check]:
    """All checks, the most important first. It takes some tenths of a second and changes nothing. Blocks."""
    return list(_checks(settings))


def _checks(settings: Settings) -> Iterator[Check]:
    yield _kernel()
    yield _root()
    yield from _features(settings)
    yield _library("libseccomp", "libseccomp.so.2", "no instance can be launched", "apt-get install libseccomp2")
    for program, meaning in _PROGRAMS.items():
        path = shutil.which(program, path=_SEARCH)
        yield _check(meaning, path is not None, path or "not installed")
    yield machines.examine(settings)
    yield machines.examine_hypervisors(settings.machines)
    yield _ipv6()
    yield _forwarding()
    yield _link(settings)
    yield _foreign_firewall()
    yield _subordinate_ids()
    yield _operators()
    yield _rlimits()
    yield _files()
    yield _disk(settings)


def _check(meaning: _Meaning, good: bool | None, detail: str) -> Check:
    if good:
        return Check(name=meaning.name, state="ok", detail=detail)
    state = meaning.state if good is False else "unknown"
    return Check(name=meaning.name, state=state, detail=detail, consequence=meaning.consequence, hint=meaning.hint)


def _features(settings: Settings) -> Iterator[Check]:
    try:
        found = features.probe(settings.root)
    except InsulaError as error:
        found = dict.fromkeys(_FEATURES, features.Feature(None, error.message))
    for name, meaning in _FEATURES.items():
        if name == "virtual_machines" and settings.machines.hypervisor != "qemu":
            continue
        works, detail = found[name]
        yield _check(meaning, works, detail)


def _kernel() -> Check:
    release = platform.release()
    numbers = tuple(int(part) for part in release.split("-")[0].split("+")[0].split(".")[:2] if part.isdigit())
    meaning = _Meaning("kernel", "degraded", "Insula is made for Linux 6.1 and later", "use a newer kernel")
    return _check(meaning, numbers >= _MIN_KERNEL, release)


def _root() -> Check:
    meaning = _Meaning("root", "missing", "insulad can't make namespaces and mounts", "start insulad as root")
    return _check(meaning, os.geteuid() == 0, f"user {os.geteuid()}")


def _library(name: str, soname: str, consequence: str, hint: str) -> Check:
    try:
        ctypes.CDLL(soname)
    except OSError:
        return _check(_Meaning(name, "missing", consequence, hint), False, f"{soname} is not there")
    return Check(name=name, state="ok", detail=soname)


def _ipv6() -> Check:
    there = Path("/proc/sys/net/ipv6").exists()
    meaning = _Meaning("IPv6", "degraded", "networks have IPv4 only", "boot without ipv6.disable=1")
    return _check(meaning, there, "there" if there else "not in this kernel")


def _forwarding() -> Check:
    """Check that the host's network namespace forwards IPv4; packets of tenants to the outside pass through it."""
    value = Path("/proc/sys/net/ipv4/ip_forward").read_text().strip()
    meaning = _Meaning("ip_forward", "degraded", "instances can't reach the outside", "restart insulad, which sets it")
    return _check(meaning, value == "1", f"net.ipv4.ip_forward = {value}")


def _link(settings: Settings) -> Check:
    """Check that the bandwidth between the host and the outside is known: devices of virtual machines have no speed."""
    try:
        bits = settings.network.link_bits or link.measured_link()
    except OSError:
        bits = None
    meaning = _Meaning("link speed", "degraded", "`insula guarantee set --out` and `--in` are refused", link.HINT)
    if bits and bits >= _FAST_LINK:
        more = "; guarantees have one lock for all processors: 1 to 2 million packets a second"
        return Check(name=meaning.name, state="ok", detail=f"{format_rate(bits)}{more}")
    return _check(meaning, bits is not None, format_rate(bits) if bits else "not known")


def _foreign_firewall() -> Check:
    """Check that no foreign FORWARD chain has the policy drop, which Docker sets; it would drop tenants' packets."""
    meaning = _Meaning(
        "other firewalls",
        "degraded",
        "a rule that is not ours drops what instances send to the outside",
        "accept the tenants' uplinks in that chain (Docker: DOCKER-USER)",
    )
    try:
        with nftables.Nft() as nft:
            tables = [t for t in nft.tables() if t in (("ip", "filter"), ("ip6", "filter"), ("inet", "filter"))]
            texts = [nft.rules(*table) for table in tables]
    except (OSError, InsulaError) as error:
        return _check(meaning, None, str(error))
    dropping = [" ".join(t) for t, text in zip(tables, texts, strict=True) if _drops_forwarded(text)]
    return _check(meaning, not dropping, f"dropping: {', '.join(dropping)}" if dropping else "none drops by policy")


def _drops_forwarded(rules: str) -> bool:
    return any("hook forward" in line and "policy drop" in line for line in rules.splitlines())


def _subordinate_ids(files: Sequence[str] = ("/etc/subuid", "/etc/subgid")) -> Check:
    """Check that no user of this host may map IDs of tenants (subuid(5))."""
    first, last = FIRST_ID, FIRST_ID + MAX_TENANTS * IDS_PER_TENANT
    shared = []
    for file in files:
        try:
            lines = Path(file).read_text().splitlines()
        except FileNotFoundError:
            continue
        for line in lines:
            owner, *numbers = line.strip().split(":")
            if len(numbers) == 2 and all(n.isdecimal() for n in numbers):
                start, count = int(numbers[0]), int(numbers[1])
                if start < last and start + count > first:
                    shared.append(f"{file}: {owner}")
    meaning = _Meaning(
        "subordinate IDs",
        "degraded",
        "users of this host may own files and processes of tenants",
        f"keep {first} to {last - 1} free in /etc/subuid and /etc/subgid",
    )
    return _check(meaning, not shared, ", ".join(shared) if shared else f"{first} to {last - 1} are free")


def _operators(group: str = OPERATORS) -> Check:
    """List who else is an operator: the members of the group, and users whose primary group it is (group(5))."""
    try:
        entry = grp.getgrnam(group)
    except KeyError:
        return Check(name="operators", state="ok", detail=f"only root; there is no group {group}")
    members = {*entry.gr_mem, *(user.pw_name for user in pwd.getpwall() if user.pw_gid == entry.gr_gid)}
    shown = ", ".join(sorted(members)) or "nobody"
    return Check(name="operators", state="ok", detail=f"root, and in the group {group}, which equals root: {shown}")


def _rlimits() -> Check:
    there = bool(capabilities.current().effective & capabilities.to_mask(["SYS_RESOURCE"]))
    meaning = _Meaning(
        "rlimits",
        "degraded",
        "`--ulimit` can't go above the daemon's own hard limits",
        "start insulad with CAP_SYS_RESOURCE",
    )
    return _check(meaning, there, "CAP_SYS_RESOURCE" if there else "no CAP_SYS_RESOURCE")


def _files() -> Check:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = hard == resource.RLIM_INFINITY or hard >= _LOW_FILES
    meaning = _Meaning(
        "open files",
        "degraded",
        "hundreds of instances, not thousands",
        f"start insulad with LimitNOFILE={_LOW_FILES} or more",
    )
    return _check(meaning, enough, f"at most {hard}")


def _disk(settings: Settings) -> Check:
    directory = settings.root
    while not directory.exists():
        directory = directory.parent
    usage = shutil.disk_usage(directory)
    meaning = _Meaning("disk", "degraded", "images and instances may not fit", "free some space, or move INSULA_ROOT")
    return _check(meaning, usage.free > _LOW_DISK, f"{format_size(usage.free)} free at {directory}")
