"""Kernel settings under /proc/sys/net (Documentation/networking/ip-sysctl.rst), in the calling thread's namespace.

Settings of the host itself are changed only as forwarding needs it. The old value is recorded before each change, so
that `restore` can restore it also after a crash.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from insula.kernel import descriptors, mounts
from insula.kernel.netns import call_in

_NET: Final = "/proc/sys/net"
_FRAGMENTS: Final = {"high_thresh": str(32 << 20), "time": "2"}  # bytes, seconds
ROUTER = {
    "ipv4/ip_forward": "1",
    **{
        f"ipv4/conf/{scope}/{name}": value
        for scope in ("all", "default")
        for name, value in {
            "rp_filter": "1",
            "arp_ignore": "1",  # a gateway address is answered on its own network only
            "arp_announce": "2",
            "accept_redirects": "0",
            "send_redirects": "0",
            "accept_source_route": "0",
        }.items()
    },
    "ipv6/conf/all/forwarding": "1",
    "ipv6/conf/all/accept_ra": "0",
    "ipv6/conf/default/accept_ra": "0",
    "ipv6/conf/all/accept_redirects": "0",
    "ipv6/conf/default/accept_redirects": "0",
    "ipv6/conf/default/accept_dad": "0",
    "ipv6/conf/default/disable_ipv6": "1",  # a bridge has IPv6 if its network has; ports never
    # br_netfilter: the rules of the router judge bridged packets too (network/linux/rules.py)
    "bridge/bridge-nf-call-iptables": "1",
    "bridge/bridge-nf-call-ip6tables": "1",
    "bridge/bridge-nf-call-arptables": "0",
    # a packet outside of the window that the kernel expects is no reason to lose it: instances judge that themselves
    "netfilter/nf_conntrack_tcp_be_liberal": "1",
    # fragments wait here until their packet is whole: what a port may send in this time takes half of it
    **{f"ipv4/ipfrag_{name}": value for name, value in _FRAGMENTS.items()},
    **{f"netfilter/nf_conntrack_frag6_{name.replace('time', 'timeout')}": value for name, value in _FRAGMENTS.items()},
}


BRIDGE_FILTERS: Final = tuple(f"bridge/bridge-nf-call-{table}" for table in ("iptables", "ip6tables", "arptables"))


def has_bridge_filter() -> bool:
    """Whether bridged packets can pass the rules for routed ones (the module br_netfilter)."""
    return read(BRIDGE_FILTERS[0]) is not None


def bridge(name: str) -> dict[str, str]:
    """Return settings of a bridge: all neighbours have permanent entries, so none is resolved."""
    return {f"{ip}/neigh/{name}/mcast_solicit": "0" for ip in ("ipv4", "ipv6")}


INSTANCE: Final = {"ipv4/ip_unprivileged_port_start": "0", "ipv4/ping_group_range": "0 2147483647"}
"""Settings of an instance's namespace."""


def interface(*, ipv6: bool) -> dict[str, str]:
    """Return settings that a device takes over which an instance's namespace gets afterwards."""
    return {
        "ipv6/conf/default/disable_ipv6": "0" if ipv6 else "1",
        "ipv6/conf/default/accept_ra": "0",
        "ipv6/conf/default/autoconf": "0",
        "ipv6/conf/default/accept_redirects": "0",
        "ipv6/conf/default/accept_dad": "0",
    }


def write(settings: Mapping[str, str], procfs: Procfs | None = None) -> None:
    """Write settings; those that the kernel lacks (a module isn't loaded, or no IPv6) are ignored."""
    with contextlib.ExitStack() as stack:
        net = procfs.open() if procfs else os.open(_NET, os.O_PATH | os.O_CLOEXEC)
        stack.callback(os.close, net)
        directories: dict[str, int | None] = {}  # looked up once each: see `Procfs`
        for path, value in settings.items():
            directory, _, name = path.partition("/")
            if directory not in directories:
                directories[directory] = _directory(net, directory, stack)
            if (parent := directories[directory]) is not None:
                _write(parent, name, value)


def _directory(net: int, name: str, stack: contextlib.ExitStack) -> int | None:
    try:
        fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=net)
    except FileNotFoundError:
        return None
    stack.callback(os.close, fd)
    return fd


def _write(directory: int, name: str, value: str) -> None:
    try:
        fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


class Procfs:
    """A procfs for the settings of many network namespaces, replaced after `USES`.

    In one procfs the directories of all network namespaces have the same names, and are in one hash chain of the
    kernel: with a thousand namespaces a look-up takes a millisecond.
    """

    USES: Final = 64

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses = 0
        self._mount: int | None = None

    def close(self) -> None:
        with self._lock:
            self._uses = 0
            if self._mount is not None:
                os.close(self._mount)
            self._mount = None

    def open(self) -> int:
        """Open its sys/net; the caller closes it."""
        if self._uses >= self.USES:
            self.close()
        with self._lock:
            if self._mount is None:
                with contextlib.suppress(OSError):  # in a user namespace, or an old kernel: the usual one
                    self._mount = mounts.filesystem("proc")
            self._uses += 1
            net = _NET if self._mount is None else "sys/net"
            return os.open(net, os.O_PATH | os.O_CLOEXEC, dir_fd=self._mount)


def read(name: str) -> str | None:
    """Read a setting; None if the kernel lacks it."""
    try:
        with open(f"/proc/sys/net/{name}") as file:
            return " ".join(file.read().split())
    except FileNotFoundError:
        return None


class OpenSettings:
    """Settings of one network namespace that are read often. Their files stay open: each takes a descriptor, and is
    read at once by any thread; to look them up takes a thread in the namespace. `netns` is its descriptor."""

    def __init__(self, netns: int, names: Sequence[str]) -> None:
        self._netns, self._names = netns, names
        self._files: dict[str, int] = {}

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def read(self) -> dict[str, str | None]:
        """Return the values; None for one that the kernel lacks. It may have it the next time: a module was loaded."""
        for _ in range(2):
            if len(self._files) < len(self._names):
                self.close()
                call_in(self._netns, self._open)
            try:
                found = {name: " ".join(os.pread(fd, 4096, 0).decode().split()) for name, fd in self._files.items()}
            except FileNotFoundError:  # the module was removed
                self.close()
                continue
            return {name: found.get(name) for name in self._names}
        return dict.fromkeys(self._names)

    def _open(self) -> None:
        for name in self._names:
            with contextlib.suppress(FileNotFoundError):
                file = os.open(f"{_NET}/{name}", os.O_RDONLY | os.O_CLOEXEC)
                self._files[name] = descriptors.move_above_select_limit(file)


def differences(settings: Mapping[str, str]) -> list[str]:
    """Return differences from `settings`, as text."""
    found = [(name, value, read(name)) for name, value in settings.items()]
    return [f"sysctl net/{name} is {now}, not {value}" for name, value, now in found if now not in (None, value)]


FORWARDING = {4: "ipv4/ip_forward", 6: "ipv6/conf/all/forwarding"}
_DEVICE = re.compile(r"(?!(all|default|lo)$)[\w.@:+-]+")  # names that need no quoting in rules


class HostSettings:
    """Changes of the host's settings; `record` is the file with the old values."""

    def __init__(self, record: Path) -> None:
        self._record = record
        self._devices = record.with_name("forwarding.json")
        self._lock = threading.Lock()

    def closed(self, version: int) -> list[str]:
        """Return the devices that the host had before `forward` enabled forwarding of this IP version.

        Empty if forwarding was already enabled. Call it before `forward`. Later devices are not included: a program
        that makes them, such as Docker, may rely on forwarding.
        """
        name = FORWARDING[version]
        with self._lock:
            recorded: dict[str, list[str]] = _load(self._devices)
            if read(name) == "0":
                devices = sorted(os.listdir(f"/proc/sys/net/ipv{version}/conf"))
                recorded[name] = [device for device in devices if _DEVICE.fullmatch(device)]
                _save(self._devices, recorded)
                return recorded[name]
            return recorded.get(name, []) if name in self._changes() else []

    def forward(self, version: int) -> None:
        """Enable forwarding of this IP version on the host."""
        name = FORWARDING[version]
        with self._lock:
            if read(name) != "0":
                return
            if version == 6:  # a router ignores router advertisements by default: keep the host's own routes
                for device in os.listdir("/proc/sys/net/ipv6/conf"):
                    if read(f"ipv6/conf/{device}/accept_ra") == "1":
                        self._set(f"ipv6/conf/{device}/accept_ra", "2")
            self._set(name, "1")

    def at_least(self, name: str, value: int) -> None:
        """Raise a setting to at least `value`."""
        with self._lock:
            now = read(name)
            if now is not None and int(now) < value:
                self._set(name, str(value))

    def restore(self) -> None:
        """Restore the settings that were changed here and not changed again by others."""
        for name, (before, ours) in reversed(self._changes().items()):
            if read(name) == ours:
                write({name: before})
        self._record.unlink(missing_ok=True)
        self._devices.unlink(missing_ok=True)

    def _set(self, name: str, value: str) -> None:
        changes = self._changes()
        before = changes[name][0] if name in changes else read(name)
        changes[name] = (before or "", value)
        _save(self._record, changes)
        write({name: value})

    def _changes(self) -> dict[str, tuple[str, str]]:
        return {name: (before, ours) for name, (before, ours) in _load(self._record).items()}


def _load(path: Path) -> dict[str, list[str]]:
    try:
        loaded: dict[str, list[str]] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return loaded


def _save(path: Path, value: Mapping[str, Sequence[str]]) -> None:
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(value))
    draft.rename(path)
