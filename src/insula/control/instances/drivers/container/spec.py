"""Makes a config.json (OCI runtime-spec 1.2) from an `InstanceSpec` and the image's configuration.

The OCI spec (github.com/opencontainers/runtime-spec, config.md and config-linux.md) describes a whole container:
its process, mounts, namespaces and limits. Defaults are Docker's, with these exceptions: there is always a user
namespace, so that root inside has no rights outside; no_new_privs is always on; a memory limit includes swap; only
harmless devices may be opened.

Every value from a user is checked here, even if it was checked before: `Invalid` with one line.
"""

from __future__ import annotations

import functools
import os
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from insula.container.create.rootfs import VOLUME
from insula.control.instances.drivers.container import nesting, seccomp_default
from insula.control.instances.drivers.container.users import User
from insula.kernel import capabilities
from insula.model import rules
from insula.model.errors import Invalid, Unavailable
from insula.model.objects import (
    IDS_PER_TENANT,
    ConsoleSize,
    ContainerOptions,
    ImageConfig,
    InstanceSpec,
    Resources,
    Rlimit,
    TmpfsMount,
)
from insula.model.rules import MAX_ARGUMENT, MIN_MEMORY
from insula.model.units import shorten

OCI_VERSION: Final = "1.2.0"
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
INIT: Final = "/dev/init"
"""The path of tini(1) for `--init`. It is in /dev, which the image does not provide."""

TERMINALS: Final = 64
"""The most pseudoterminals of one instance. The host has 4096, unless terminals.py raises that."""

MAX_ARGUMENTS: Final = 2 << 20  # a quarter of the usual stack of 8 MiB, execve(2)
MAX_VOLUMES: Final = 64
CPU_PERIOD: Final = 100_000  # µs
DEFAULT_SHARES: Final = 1024  # the kernel's (cpu.shares)

_INIT_PROGRAMS = ("/usr/bin/tini-static", "/usr/bin/tini")  # the static one needs no library of the image
_ETC_FILES = ("hostname", "hosts", "resolv.conf")
_HOSTNAME = re.compile(rules.HOSTNAME)
_VARIABLE = re.compile(rules.VARIABLE)
_SYSCTL = re.compile(rules.SYSCTL)
_SYSCTL_VALUE = re.compile(rules.SYSCTL_VALUE)

_MOUNTS: Final[tuple[dict[str, Any], ...]] = (
    {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
    {
        "destination": "/dev",
        "type": "tmpfs",
        "source": "tmpfs",
        "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
    },
    {
        "destination": "/dev/pts",
        "type": "devpts",
        "source": "devpts",
        "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5", f"max={TERMINALS}"],
    },
    {
        "destination": "/dev/shm",
        "type": "tmpfs",
        "source": "shm",
        "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
    },
    {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
    {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
    {
        "destination": "/sys/fs/cgroup",
        "type": "cgroup",
        "source": "cgroup",
        "options": ["ro", "nosuid", "noexec", "nodev"],
    },
)

# files in the container's file systems that reveal something of the host, or change it: Docker's lists, and locks of
# other tenants' files, the number of the host's terminals, disks, and the host's kernel command line
_MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/cmdline",
    "/proc/diskstats",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/locks",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/sys/kernel/pty",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_NO_TMPFS = ("/proc", "/sys", "/dev")

# null, zero, full, random, urandom, tty, console, ptmx, and the pseudoterminals; the user namespace forbids mknod(2)
_DEVICES = ((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (136, None))

_SYSCTLS = {
    "net.ipv4.ip_unprivileged_port_start": "0",  # its network namespace has no ports of others
    "net.ipv4.ping_group_range": f"0 {IDS_PER_TENANT - 1}",
}


def config(
    spec: InstanceSpec,
    image: ImageConfig,
    *,
    user: User,
    id_base: int,
    hostname: str,
    cgroup: str,
    etc: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """The OCI config.json of an instance.

    `user` is the user of `spec.user` or `image.user` (`users.resolve`). IDs 0 to 65535 inside are `id_base` and up
    outside. `cgroup` is the group's path below every hierarchy. `etc` is a directory with hostname, hosts and
    resolv.conf to mount over the image's. Raises `Invalid`, and `Unavailable` for `--init` without tini(1).
    """
    options = spec.options
    if not isinstance(options, ContainerOptions):
        raise Invalid(f"there is no container with options of the kind {spec.kind}", "use those of containers")
    default = capabilities.DEFAULT | (nesting.CAPABILITIES if options.nesting else 0)
    names = capabilities.to_names(capabilities.adjust(default, options.cap_add, options.cap_drop))
    asked = capabilities.to_names(capabilities.adjust(capabilities.DEFAULT, options.cap_add, options.cap_drop))
    # as after execve(2): a user other than root has no capabilities, but keeps the bounding set
    own = names if user.uid == 0 else []
    mounts = [_shm_mount(mount, options.shm_size) if mount["source"] == "shm" else dict(mount) for mount in _MOUNTS]
    own_mounts = [*map(_tmpfs_mount, spec.mounts), *_volume_mounts(spec, image)]
    mounts += sorted(own_mounts, key=lambda mount: str(mount["destination"]))  # outer ones first
    if etc is not None:
        mounts += [_etc_mount(Path(etc), name) for name in _ETC_FILES]
    args = command(spec, image)
    if options.init:
        mounts.append(_init_mount())
        args = [INIT, "--", *args]
    env = environment(image.env, spec.env, hostname=hostname, home=user.home, terminal=spec.tty)
    _check_size(args, env)
    made: dict[str, Any] = {
        "ociVersion": OCI_VERSION,
        "hostname": _check_hostname(hostname),
        "root": {"path": "rootfs", "readonly": spec.read_only},
        "process": {
            "terminal": spec.tty,
            "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups), "umask": 0o022},
            "args": args,
            "env": env,
            "cwd": _check_directory(spec.working_dir or image.working_dir or "/"),
            "capabilities": {"bounding": names, "effective": own, "permitted": own, "inheritable": [], "ambient": []},
            "rlimits": [_rlimit(limit) for limit in options.rlimits],
            "noNewPrivileges": True,
            "oomScoreAdj": 0,  # not insulad's, which makes the kernel kill it last
        },
        "mounts": mounts,
        "linux": {
            "namespaces": [{"type": t} for t in ("user", "pid", "mount", "network", "ipc", "uts", "cgroup")],
            "uidMappings": [_mapping(id_base)],
            "gidMappings": [_mapping(id_base)],
            "cgroupsPath": f"/{cgroup.strip('/')}",
            "resources": resources(spec.resources),
            "sysctl": {**_SYSCTLS, **_check_sysctls(options.sysctls)},
            "seccomp": seccomp_default.profile(
                asked, nesting=options.nesting, aio=options.aio, families=options.socket_families
            ),
            "maskedPaths": [*_MASKED, *_thermal_throttles()],
            "readonlyPaths": list(_READ_ONLY),
        },
    }
    if options.nesting:
        nesting.allow(made)
    return made


def command(spec: InstanceSpec, image: ImageConfig) -> list[str]:
    """The arguments of PID 1, combined as in Docker: an entrypoint of the spec discards the image's command too."""
    if spec.entrypoint is not None:
        args = [*(word for word in spec.entrypoint if word), *spec.command]
    else:
        args = [*image.entrypoint, *(spec.command or image.cmd)]
    if not args or not args[0]:
        raise Invalid("there is no command to run, neither from you nor in the image", "give one after the image")
    for arg in args:
        if "\0" in arg:
            raise Invalid(f"argument {shorten(arg)} has a NUL byte", "execve(2) cannot pass one")
    return args


def environment(
    image: Iterable[str], own: Mapping[str, str], *, hostname: str, home: str, terminal: bool = False
) -> list[str]:
    """NAME=value entries: defaults, overridden by the image's variables, overridden by the user's own."""
    values = {"PATH": PATH, "HOSTNAME": hostname, "HOME": home, **({"TERM": "xterm"} if terminal else {})}
    values |= dict(entry.partition("=")[::2] for entry in image)
    values |= own
    for name, value in values.items():
        if not _VARIABLE.fullmatch(name) or "\0" in value:
            raise Invalid(f"environment variable {shorten(name)} is not valid", "a name has no '=', neither has a NUL")
    return [f"{name}={value}" for name, value in values.items()]


def console_size(size: ConsoleSize | None) -> dict[str, Any]:
    """The part of `process` that tells the size of its terminal at its start, if it is known."""
    return {"consoleSize": {"height": size.rows, "width": size.columns}} if size else {}


def resources(limits: Resources) -> dict[str, Any]:
    """`linux.resources`: limits of the control group, and the devices that may be used."""
    result: dict[str, Any] = {"devices": [{"allow": False, "access": "rwm"}]}
    for major, minor in _DEVICES:
        rule = {"allow": True, "type": "c", "major": major, "minor": minor, "access": "rwm"}
        result["devices"].append({k: v for k, v in rule.items() if v is not None})
    if (cpus := limits.cpus) is not None:
        if not rules.MIN_CPUS <= cpus <= rules.MAX_CPUS:
            raise Invalid(f"there can't be a limit of {shorten(cpus)} CPUs", "use 0.01 or more, as in 0.5 or 2")
        shares = min(max(2, int(1024 * cpus)), 262144)  # its share of CPU time under contention
        result["cpu"] = {"quota": int(CPU_PERIOD * cpus), "period": CPU_PERIOD, "shares": shares}
    if (memory := limits.memory) is not None:
        if not MIN_MEMORY <= memory <= rules.MAX_BYTES:
            what = f"there can't be a limit of {shorten(memory)} bytes of memory"
            raise Invalid(what, f"use at least {MIN_MEMORY >> 20}m")
        result["memory"] = {"limit": memory, "swap": memory}  # `swap` is the limit of memory and swap together
    else:
        # no limit; it only makes version 1 count the buffers of sockets, for the tenant's limit
        result["memory"] = {"kernelTCP": -1}
    if (pids := limits.pids) is not None:
        if not 1 <= pids <= rules.MAX_PIDS:
            raise Invalid(f"there can't be a limit of {shorten(pids)} processes", "use 1 to 4194304")
        result["pids"] = {"limit": pids}
    return result


def update(limits: Resources) -> dict[str, Any]:
    """`linux.resources` for a running container: as `resources`, but with -1 for each limit that is not set.

    `checkBeforeUpdate` makes a memory limit below the usage fail, instead of killing processes."""
    result = {name: value for name, value in resources(limits).items() if name != "devices"}
    result.setdefault("cpu", {"quota": -1, "period": CPU_PERIOD, "shares": DEFAULT_SHARES})
    if limits.memory is None:
        result["memory"] = {"limit": -1, "swap": -1}
    result["memory"]["checkBeforeUpdate"] = True
    result.setdefault("pids", {"limit": -1})
    return result


# -- parts ----------------------------------------------------------------------------------------------------------


def _mapping(id_base: int) -> dict[str, int]:
    if not IDS_PER_TENANT <= id_base <= (1 << 32) - 1 - IDS_PER_TENANT:
        raise Invalid(f"ID base {shorten(id_base)} is not a range of a tenant", "ranges begin at 65536")
    return {"containerID": 0, "hostID": id_base, "size": IDS_PER_TENANT}


def _etc_mount(etc: Path, name: str) -> dict[str, Any]:
    options = ["bind", "rprivate", "nosuid", "nodev", "noexec"]
    return {"destination": f"/etc/{name}", "type": "bind", "source": str(etc / name), "options": options}


def _init_mount() -> dict[str, Any]:
    for program in _INIT_PROGRAMS:
        if os.access(program, os.X_OK):
            options = ["bind", "sealed", "rprivate", "ro", "nosuid", "nodev"]
            return {"destination": INIT, "type": "bind", "source": program, "options": options}
    raise Unavailable("tini is not installed, so there is no init for --init", "apt-get install tini")


def _tmpfs_mount(tmpfs: TmpfsMount) -> dict[str, Any]:
    path = tmpfs.path
    parts = path.split("/")[1:]
    plain = path.startswith("/") and all(part not in ("", ".", "..") for part in parts) and len(path) < 4096
    if not plain or "\0" in path or any(path == no or path.startswith(f"{no}/") for no in _NO_TMPFS):
        raise Invalid(
            f"there can be no tmpfs at {shorten(path)}", "use a plain absolute path outside /proc, /sys, /dev"
        )
    _check_tmpfs_size(tmpfs.size)
    if not 0 <= tmpfs.mode <= rules.MAX_TMPFS_MODE:
        raise Invalid(f"a tmpfs can't have mode {tmpfs.mode:o}", "use octal digits up to 1777, as in 755")
    for kind, number in (("user", tmpfs.uid), ("group", tmpfs.gid)):
        if not 0 <= number < IDS_PER_TENANT:
            raise Invalid(f"a tmpfs can't belong to {kind} {shorten(number)}", f"use 0 to {IDS_PER_TENANT - 1}")
    options = ["nosuid", "nodev", *([] if tmpfs.executable else ["noexec"]), *(["ro"] if tmpfs.read_only else [])]
    options += [f"mode={tmpfs.mode:o}", f"size={tmpfs.size}"]
    options += [f"{name}={number}" for name, number in (("uid", tmpfs.uid), ("gid", tmpfs.gid)) if number]
    return {"destination": path, "type": "tmpfs", "source": "tmpfs", "options": options}


def _shm_mount(mount: Mapping[str, Any], size: int) -> dict[str, Any]:
    _check_tmpfs_size(size)
    return {**mount, "options": [*(option for option in mount["options"] if "size=" not in option), f"size={size}"]}


def _check_tmpfs_size(size: int) -> None:
    if not rules.MIN_TMPFS <= size <= rules.MAX_BYTES:
        raise Invalid(f"there can't be a tmpfs of {shorten(size)} bytes", "use at least 4k")


def _volume_mounts(spec: InstanceSpec, image: ImageConfig) -> list[dict[str, Any]]:
    """The directories that the image declares as volumes (image-spec, `Volumes`), except where a tmpfs is asked for.

    They are directories of the instance's own root, made if they are missing, with what the image has in them. Where
    the root is read-only each is a mount of its own, which is writable (see `rootfs.VOLUME`).
    """
    if len(image.volumes) > MAX_VOLUMES:
        raise Invalid(f"the image declares {len(image.volumes)} volumes", f"use one with at most {MAX_VOLUMES}")
    paths = {posixpath.normpath("/" + path.lstrip("/")) for path in image.volumes}
    taken = {tmpfs.path for tmpfs in spec.mounts} | {"/"}
    if bad := next((path for path in paths if "\0" in path or len(os.fsencode(path)) > 4095), None):
        raise Invalid(f"the image declares a volume at {shorten(bad)}, which is not a path", "use another image")
    kept = [path for path in paths - taken if not any(path == no or path.startswith(f"{no}/") for no in _NO_TMPFS)]
    options = ["rw"] if spec.read_only else []
    return [{"destination": path, "type": VOLUME, "source": "root", "options": options} for path in kept]


def _rlimit(limit: Rlimit) -> dict[str, Any]:
    """The OCI form of a resource limit; -1 becomes RLIM_INFINITY."""
    if limit.name not in rules.RLIMITS:
        raise Invalid(f"there is no rlimit {shorten(limit.name)}", "getrlimit(2) lists them, as in nofile")
    top = (1 << 64) - 1
    soft, hard = (top if value == -1 else value for value in (limit.soft, limit.hard))
    if not 0 <= soft <= hard <= top:
        what = f"there can't be a ulimit {limit.name}={limit.soft}:{limit.hard}"
        raise Invalid(what, "the first number can't be above the second; -1 is no limit")
    return {"type": f"RLIMIT_{limit.name.upper()}", "soft": soft, "hard": hard}


def _thermal_throttles() -> list[str]:
    """The files with each CPU's counters of thermal throttling. They would reveal the load of other tenants."""
    return _throttles_of(Path("/sys/devices/system/cpu/present").read_text())


@functools.lru_cache(maxsize=1)
def _throttles_of(present: str) -> list[str]:
    """The files for the CPUs that are `present` (sysfs). Cached: finding them takes as long as the rest of a config."""
    found = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle")
    return sorted(str(path) for path in found)


# -- checks ---------------------------------------------------------------------------------------------------------


def _check_hostname(hostname: str) -> str:
    if len(hostname) > rules.MAX_HOSTNAME or not _HOSTNAME.fullmatch(hostname):
        raise Invalid(
            f"host name {shorten(hostname)} is not made of DNS labels", "use up to 64 of a-z, 0-9, '-' and '.'"
        )
    return hostname


def _check_directory(path: str) -> str:
    if not path.startswith("/") or "\0" in path or len(os.fsencode(path)) > rules.MAX_PATH:
        raise Invalid(f"working directory {shorten(path)} is not an absolute path", "begin it with /")
    return path


def _check_sysctls(sysctls: Mapping[str, str]) -> Mapping[str, str]:
    for name, value in sysctls.items():
        if not _SYSCTL.fullmatch(name):
            raise Invalid(
                f"sysctl {shorten(name)} is not the container's own: it would change the host's",
                "use net.*, fs.mqueue.*, kernel.sem, kernel.msg* or kernel.shm*",
            )
        if not _SYSCTL_VALUE.fullmatch(value):
            raise Invalid(f"sysctl {name} cannot be {shorten(value)}", "use printable characters on one line")
    return sysctls


def _check_size(args: Sequence[str], env: Sequence[str]) -> None:
    """Raise Invalid where execve(2) would fail with E2BIG. Each string also takes its NUL and a pointer."""
    try:
        sizes = [len(os.fsencode(text)) + 1 for text in (*args, *env)]
    except UnicodeEncodeError:
        raise Invalid("an argument or variable has a character that has no encoding", "use UTF-8") from None
    if max(sizes) > MAX_ARGUMENT or sum(sizes) + 8 * len(sizes) > MAX_ARGUMENTS:
        raise Invalid(
            f"arguments and environment are too long: {sum(sizes)} bytes",
            f"use at most {MAX_ARGUMENT >> 10} KiB for each and {MAX_ARGUMENTS >> 20} MiB for all",
        )
