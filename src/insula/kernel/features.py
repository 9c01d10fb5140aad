"""What this kernel can really do, found out by doing it.

That a file or a name exists says little: overlayfs may be there and refuse this disk, /dev/kvm may be there without a
processor behind it. So each probe tries the thing itself, in a child whose namespaces are its own, so that whatever it
made is gone when it ends. A whole run takes some tenths of a second and leaves nothing.

`probe(directory)` starts `python -m insula.kernel.features`, because the caller may have threads, and a process with
threads must neither fork Python code nor move itself between namespaces.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from insula.kernel import cgroups, criu, mounts, netlink, nftables, process, syscalls
from insula.kernel.seccomp import load as seccomp_load
from insula.model.errors import Failed, Unavailable

TIMEOUT = 10.0
_SCRATCH = ".features-"
_CONTAINER = (
    syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWPID
    | syscalls.CLONE_NEWNET
    | syscalls.CLONE_NEWIPC
    | syscalls.CLONE_NEWUTS
    | syscalls.CLONE_NEWCGROUP
)


class Feature(NamedTuple):
    """`works` is None where it could not be found out; `found` says what was seen, in a few words."""

    works: bool | None
    found: str


class Lacking(Exception):
    """Raised by a probe: the feature is not there, for this reason."""


def probe(directory: str | os.PathLike[str]) -> dict[str, Feature]:
    """Try every feature; file systems are tried on the disk of `directory`. `Failed` if that could not be done."""
    command = [sys.executable, "-I", "-m", "insula.kernel.features", os.fspath(directory)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=True, stdin=subprocess.DEVNULL)
        answers: dict[str, list[Any]] = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise Failed(f"features of the host can't be probed: {type(error).__name__}", "see the daemon's log") from error
    return {name: Feature(*answer) for name, answer in answers.items()}


# -- the probes: each returns what it found, or raises ----------------------------------------------------------------


def user_namespaces() -> str:
    """user_namespaces(7): root inside, nobody outside."""
    _in_child(lambda: syscalls.unshare(syscalls.CLONE_NEWUSER))
    return "made one"


def namespaces() -> str:
    """namespaces(7): all that a container has beside the user namespace, at once."""
    _in_child(lambda: syscalls.unshare(_CONTAINER))
    return "pid, mnt, net, ipc, uts, cgroup"


def overlay(scratch: str) -> str:
    """overlayfs with its upper layer on this disk."""
    lower, upper, work = _directories(scratch, "lower", "upper", "work")
    _in_child(lambda: mounts.overlay([lower], upper, work))
    return "mounted"


def idmapped_layers(scratch: str) -> str:
    """mount_setattr(2) MOUNT_ATTR_IDMAP: layers shown with a tenant's own IDs, under an overlay."""

    def mount() -> None:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        lower, at, upper, work = _directories(scratch, "mapped", "at", "upper2", "work2")
        layer = mounts.idmapped(lower, process.user_namespace([(0, 1 << 30, 65536)], [(0, 1 << 30, 65536)]))
        syscalls.move_mount(layer, syscalls.AT_FDCWD, at)
        mounts.overlay([at], upper, work)

    _in_child(mount)
    return "mounted under an overlay"


def control_groups() -> str:
    """cgroups(7): which version has the controllers, and which of them."""
    tree = cgroups.detect()
    if tree.unified:
        there = set(Path(tree.unified, "cgroup.controllers").read_text().split())
        needed, kind = {"cpu", "memory", "pids", "io"}, "version 2"
    elif tree.controllers:
        there = {name for name, path in tree.controllers.items() if Path(path, "cgroup.procs").exists()}  # else hidden
        needed, kind = {"cpu", "memory", "pids", "devices", "freezer"}, "version 1"
    else:
        raise Lacking("no hierarchy is mounted")
    if needed - there:
        raise Lacking(f"{kind} without {', '.join(sorted(needed - there))}")
    return f"{kind}: {', '.join(sorted(there))}"


def seccomp() -> str:
    """seccomp(2) filters: one that allows everything."""
    allow_all = (0x06).to_bytes(4, sys.byteorder) + (0x7FFF0000).to_bytes(4, sys.byteorder)

    def load() -> None:
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        seccomp_load.load(allow_all)

    _in_child(load)
    return "loaded a filter"


def landlock() -> str:
    """landlock(7): the version of its ABI."""
    landlock_create_ruleset, version = 444, 1
    libc = ctypes.CDLL(None, use_errno=True)
    answer = libc.syscall(ctypes.c_long(landlock_create_ruleset), None, ctypes.c_long(0), ctypes.c_long(version))
    if answer < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return f"ABI {answer}"


def process_descriptors() -> str:
    """pidfd_open(2) and clone3(2) with CLONE_PIDFD."""
    os.close(os.pidfd_open(os.getpid()))
    pid, pidfd = syscalls.clone3(0)
    if pid == 0:
        os._exit(0)
    os.close(pidfd)
    os.waitpid(pid, 0)
    return "pidfd_open, clone3"


def exit_information() -> str:
    """PIDFD_GET_INFO: how a process ended that another one reaped, Linux 6.15."""
    pid, pidfd = syscalls.clone3(0)
    if pid == 0:
        os._exit(7)
    os.waitpid(pid, 0)
    status = process.exit_status(pidfd)
    os.close(pidfd)
    if status is None or os.waitstatus_to_exitcode(status) != 7:
        raise Lacking("the kernel does not tell")
    return "the kernel tells"


def links() -> str:
    """Bridges, veth(4) pairs and VXLAN devices, made in a network namespace that is gone afterwards."""

    def make() -> None:
        syscalls.unshare(syscalls.CLONE_NEWNET)
        here = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        with netlink.Rtnl() as rtnl:
            rtnl.execute(netlink.bridge("b0", mac="02:00:00:00:00:01", mtu=1500))
            bridge = rtnl.link("b0")
            assert bridge
            rtnl.execute(netlink.veth("v0", "v1", here, master=bridge.index))
            rtnl.execute(netlink.vxlan("x0", vni=1, local="127.0.0.1", mtu=1450, master=bridge.index))

    _in_child(make)
    return "bridge, veth, vxlan"


_RULES = """
table bridge t {
    set s { type ether_addr . ipv4_addr; }
    chain c {
        type filter hook forward priority 0
        ether saddr . ip saddr @s accept
    }
}
table inet t {
    chain c {
        type filter hook forward priority 0
        ct state established,related accept
    }
}
table ip t {
    chain c {
        type nat hook postrouting priority 100
        masquerade
    }
}
"""
_BRIDGE_RULES = """
table bridge t {
    chain c {
        type filter hook forward priority 0
        ct state established,related accept
    }
}
"""


def packet_filter() -> str:
    """nftables: sets in the bridge family, connection tracking, and network address translation."""
    _load_rules(_RULES)
    return "bridge sets, conntrack, nat"


def bridge_connections() -> str:
    """Connection tracking of what a bridge passes on: by nf_conntrack_bridge, or by the older br_netfilter."""
    try:
        _load_rules(_BRIDGE_RULES)
    except OSError:
        if Path("/proc/sys/net/bridge/bridge-nf-call-iptables").exists():
            return "by br_netfilter"
        raise
    return "by nf_conntrack_bridge"


def _load_rules(rules: str) -> None:
    def load() -> None:
        syscalls.unshare(syscalls.CLONE_NEWNET)
        with nftables.Nft() as nft:
            nft.run(rules)

    _in_child(load)


def virtual_machines() -> str:
    """KVM makes a machine and a processor for it. Whether a guest boots on it is another matter, and not tried."""
    create_vm, create_vcpu, get_api_version = 0xAE01, 0xAE41, 0xAE00
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    version = fcntl.ioctl(kvm, get_api_version, 0)
    if version != 12:
        raise Lacking(f"KVM speaks version {version}, not 12")
    machine = fcntl.ioctl(kvm, create_vm, 0)
    os.close(fcntl.ioctl(machine, create_vcpu, 0))
    os.close(machine)
    os.close(kvm)
    return "KVM makes a machine; booting a guest was not tried"


def open_vswitch() -> str:
    """The openvswitch kernel module, loaded or to be had."""
    if Path("/sys/module/openvswitch").exists():
        return "loaded"
    release = os.uname().release
    for name in ("modules.dep", "modules.builtin"):
        with contextlib.suppress(FileNotFoundError):
            if "/openvswitch.ko" in Path("/lib/modules", release, name).read_text():
                return "as a module"
    raise Lacking("not in this kernel")


def pressure() -> str:
    """Pressure stall information (Documentation/accounting/psi.rst)."""
    Path("/proc/pressure/memory").read_text()
    return "measured"


def checkpoint() -> str:
    """CRIU and its own opinion of this kernel."""
    try:
        return f"{criu.find()} check is content"
    except Unavailable as error:
        raise Lacking(error.message) from None


_PROBES: tuple[Callable[[], str], ...] = (
    user_namespaces,
    namespaces,
    control_groups,
    seccomp,
    landlock,
    process_descriptors,
    exit_information,
    links,
    packet_filter,
    bridge_connections,
    virtual_machines,
    open_vswitch,
    pressure,
    checkpoint,
)
_DISK_PROBES: tuple[Callable[[str], str], ...] = (overlay, idmapped_layers)

NAMES = tuple(p.__name__ for p in (*_PROBES, *_DISK_PROBES))
"""What `probe` answers about."""


# -- the process that runs them ---------------------------------------------------------------------------------------


def main(directory: str) -> None:
    """Print the answers as JSON: name → [works, found]."""
    answers = {p.__name__: _attempt(p) for p in _PROBES}
    with contextlib.ExitStack() as undo:
        try:
            scratch = _scratch(directory, undo)
        except OSError as error:
            answers |= {p.__name__: Feature(None, f"no room to try: {error.strerror}") for p in _DISK_PROBES}
        else:
            answers |= {p.__name__: _attempt(lambda p=p: p(scratch)) for p in _DISK_PROBES}  # type: ignore[misc]
    print(json.dumps(answers))


def _attempt(action: Callable[[], str]) -> Feature:
    try:
        return Feature(True, action())
    except Lacking as lacking:
        return Feature(False, str(lacking))
    except OSError as error:
        return Feature(False, error.strerror or str(error))
    except Exception as error:  # a probe must not hide what the others found
        traceback.print_exc()
        return Feature(None, f"could not be tried: {type(error).__name__}")


def _in_child(action: Callable[[], object]) -> None:
    """Run it in a child, which nothing survives; its OSError is raised here."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(5)
        try:
            action()
            os.write(writable, b"{}")
        except OSError as error:
            report = {"errno": error.errno, "text": (error.strerror or str(error))[:1000]}
            os.write(writable, json.dumps(report).encode())
        finally:
            os._exit(0)
    os.close(writable)
    with open(readable, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    if not data:
        raise Lacking("the attempt crashed")
    answer = json.loads(data)
    if answer:
        raise OSError(answer["errno"] or 0, answer["text"])


def _scratch(directory: str, undo: contextlib.ExitStack) -> str:
    """A directory for the attempts, removed afterwards; those of probes that were killed are removed too."""
    while not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    for name in os.listdir(directory):
        owner = name.removeprefix(_SCRATCH)
        if owner != name and not os.path.exists(f"/proc/{owner}"):
            shutil.rmtree(f"{directory}/{name}", ignore_errors=True)
    path = f"{directory}/{_SCRATCH}{os.getpid()}"
    os.mkdir(path, 0o700)
    undo.callback(shutil.rmtree, path, ignore_errors=True)
    return path


def _directories(scratch: str, *names: str) -> list[str]:
    paths = [f"{scratch}/{name}" for name in names]
    for path in paths:
        os.makedirs(path, exist_ok=True)
    return paths


if __name__ == "__main__":
    main(sys.argv[1])
