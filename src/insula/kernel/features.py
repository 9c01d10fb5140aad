"""Probes for kernel features. Each one uses the feature and reports whether that worked.

The existence of a file says little: overlayfs may be present and refuse this disk, and /dev/kvm may exist without a
processor that supports it. So each probe uses the feature in a child process with namespaces of its own, which removes
everything when it exits. All probes together take a few tenths of a second.

`probe(directory)` runs `python -m insula.kernel.features` as a process of its own, because the caller may have threads:
a process with threads must not run Python code after fork(2), and can't enter a new user namespace.
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

TIMEOUT = 60.0  # seconds: it takes a tenth of one, and many where the host is busy or emulated
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
    """The result of a probe. `works` is None if the probe could not run; `found` describes the result briefly."""

    works: bool | None
    found: str


class Unsupported(Exception):
    """Raised by a probe: the feature is missing; the message says why."""


def probe(directory: str | os.PathLike[str]) -> dict[str, Feature]:
    """Run all probes; those of file systems on the disk of `directory`. `Failed` if they can't be run."""
    command = [sys.executable, "-I", "-m", "insula.kernel.features", os.fspath(directory)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=True, stdin=subprocess.DEVNULL)
        answers: dict[str, list[Any]] = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise Failed(f"cannot probe the host's features: {type(error).__name__}", "see the daemon's log") from error
    return {name: Feature(*answer) for name, answer in answers.items()}


# -- the probes: each returns a short description, or raises ----------------------------------------------------------


def user_namespaces() -> str:
    """User namespaces (user_namespaces(7))."""
    _in_child(lambda: syscalls.unshare(syscalls.CLONE_NEWUSER))
    return "made one"


def namespaces() -> str:
    """The other namespaces of a container (namespaces(7)), all at once."""
    _in_child(lambda: syscalls.unshare(_CONTAINER))
    return "pid, mnt, net, ipc, uts, cgroup"


def overlay(scratch: str) -> str:
    """Overlayfs with its upper layer on this disk."""
    lower, upper, work = _directories(scratch, "lower", "upper", "work")
    _in_child(lambda: mounts.overlay([lower], upper, work))
    return "mounted"


def idmapped_layers(scratch: str) -> str:
    """Idmapped mounts (MOUNT_ATTR_IDMAP of mount_setattr(2)) as lower layers of an overlay."""

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
    """Control groups (cgroups(7)): the version, and its controllers."""
    tree = cgroups.detect()
    if tree.unified:
        there = set(Path(tree.unified, "cgroup.controllers").read_text().split())
        needed, kind = {"cpu", "memory", "pids", "io"}, "version 2"
    elif tree.controllers:
        # a controller without this file is hidden by another mount
        there = {name for name, path in tree.controllers.items() if Path(path, "cgroup.procs").exists()}
        needed, kind = {"cpu", "memory", "pids", "devices", "freezer"}, "version 1"
    else:
        raise Unsupported("no hierarchy is mounted")
    if needed - there:
        raise Unsupported(f"{kind} without {', '.join(sorted(needed - there))}")
    return f"{kind}: {', '.join(sorted(there))}"


def seccomp() -> str:
    """Seccomp filters (seccomp(2)), with one that allows everything."""
    allow_all = (0x06).to_bytes(4, sys.byteorder) + (0x7FFF0000).to_bytes(4, sys.byteorder)

    def load() -> None:
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        seccomp_load.load(allow_all)

    _in_child(load)
    return "loaded a filter"


def landlock() -> str:
    """Landlock (landlock(7)): the version of its ABI."""
    landlock_create_ruleset, version = 444, 1
    libc = ctypes.CDLL(None, use_errno=True)
    answer = libc.syscall(ctypes.c_long(landlock_create_ruleset), None, ctypes.c_long(0), ctypes.c_long(version))
    if answer < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return f"ABI {answer}"


def process_descriptors() -> str:
    """Pidfds, from pidfd_open(2) and clone3(2)."""
    os.close(os.pidfd_open(os.getpid()))
    pid, pidfd = syscalls.clone3(0)
    if pid == 0:
        os._exit(0)
    os.close(pidfd)
    os.waitpid(pid, 0)
    return "pidfd_open, clone3"


def exit_information() -> str:
    """PIDFD_GET_INFO (Linux 6.15): the exit status of a process that another one reaped."""
    pid, pidfd = syscalls.clone3(0)
    if pid == 0:
        os._exit(7)
    os.waitpid(pid, 0)
    status = process.exit_status(pidfd)
    os.close(pidfd)
    if status is None or os.waitstatus_to_exitcode(status) != 7:
        raise Unsupported("needs Linux 6.15")
    return "read an exit status"


def links() -> str:
    """Bridges, veth(4) pairs and VXLAN devices, made in a network namespace that is removed afterwards."""

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


def packet_filter() -> str:
    """Nftables: sets in the bridge family, connection tracking, and network address translation."""
    _load_rules(_RULES)
    return "bridge sets, conntrack, nat"


def bridge_connections() -> str:
    """Connection tracking of bridged packets, by the module br_netfilter."""
    os.stat("/proc/sys/net/bridge/bridge-nf-call-iptables")
    return "by br_netfilter"


def _load_rules(rules: str) -> None:
    def load() -> None:
        syscalls.unshare(syscalls.CLONE_NEWNET)
        with nftables.Nft() as nft:
            nft.run(rules)

    _in_child(load)


def virtual_machines() -> str:
    """KVM can create a virtual machine with one processor. Booting a guest is not tried."""
    create_vm, create_vcpu, get_api_version = 0xAE01, 0xAE41, 0xAE00
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    version = fcntl.ioctl(kvm, get_api_version, 0)
    if version != 12:
        raise Unsupported(f"KVM has API version {version}, not 12")
    machine = fcntl.ioctl(kvm, create_vm, 0)
    os.close(fcntl.ioctl(machine, create_vcpu, 0))
    os.close(machine)
    os.close(kvm)
    return "KVM creates a machine; booting a guest was not tried"


def open_vswitch() -> str:
    """The openvswitch kernel module, loaded or installed."""
    if Path("/sys/module/openvswitch").exists():
        return "loaded"
    release = os.uname().release
    for name in ("modules.dep", "modules.builtin"):
        with contextlib.suppress(FileNotFoundError):
            if "/openvswitch.ko" in Path("/lib/modules", release, name).read_text():
                return "as a module"
    raise Unsupported("not in this kernel")


def pressure() -> str:
    """Pressure stall information (Documentation/accounting/psi.rst)."""
    Path("/proc/pressure/memory").read_text()
    return "measured"


def checkpoint() -> str:
    """CRIU, with its own check of this kernel."""
    try:
        return f"{criu.find()} check succeeds"
    except Unavailable as error:
        raise Unsupported(error.message) from None


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
"""The names of all features."""


# -- the process that runs them ---------------------------------------------------------------------------------------


def main(directory: str) -> None:
    """Print the results as JSON: name → [works, found]."""
    answers = {p.__name__: _attempt(p) for p in _PROBES}
    with contextlib.ExitStack() as undo:
        try:
            scratch = _scratch(directory, undo)
        except OSError as error:
            answers |= {p.__name__: Feature(None, f"no scratch directory: {error.strerror}") for p in _DISK_PROBES}
        else:
            answers |= {p.__name__: _attempt(lambda p=p: p(scratch)) for p in _DISK_PROBES}  # type: ignore[misc]
    print(json.dumps(answers))


def _attempt(action: Callable[[], str]) -> Feature:
    try:
        return Feature(True, action())
    except Unsupported as error:
        return Feature(False, str(error))
    except OSError as error:
        return Feature(False, error.strerror or str(error))
    except Exception as error:  # a defect of one probe must not hide the results of the others
        traceback.print_exc()
        return Feature(None, f"the probe failed: {type(error).__name__}")


def _in_child(action: Callable[[], object]) -> None:
    """Run `action` in a forked child, for at most 5 seconds; its OSError is raised here."""
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
        raise Unsupported("the probe's process crashed")
    answer = json.loads(data)
    if answer:
        raise OSError(answer["errno"] or 0, answer["text"])


def _scratch(directory: str, undo: contextlib.ExitStack) -> str:
    """Make a scratch directory, removed by `undo`; directories left by probes that were killed are removed too."""
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
