"""`Hypervisor`: the protocol between Insula and what runs virtual machines, and what a guest consists of.

A hypervisor of type 1 runs on the hardware, as Xen and ESXi. One of type 2 is a program of an operating system.
Insula's own machines are made with one, QEMU: each is a QEMU in a container, whose life is that of the container
(`insula.machine.shim`). A hypervisor of type 1 keeps its guests itself: it is a `GuestKeeper`.

Guests have names, and a keeper knows them by nothing else. Methods block, and may be called from any thread. Each ends
after a time limit: Unavailable. Input that makes no guest is Invalid, before anything is done.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple, Protocol

from insula.model.errors import Invalid

Virtualization = Literal["pv", "pvh", "hvm"]
"""How a guest is virtualized. "pv": its kernel calls the hypervisor in place of instructions that need privileges.
"pvh": the processor does that in hardware, and there are no emulated devices. "hvm": the same, with the devices
and the firmware of a PC, for any system."""
Devices = Literal["para", "full"]
"""Whether disks and network devices are those of the hypervisor, for which a guest needs drivers, or are such as
real machines have."""
GuestState = Literal["off", "running", "paused", "stopping", "crashed", "suspended", "unknown"]
KeeperFeature = Literal["console", "events", "devices"]

LEAST_MEMORY: Final = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_MAC = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}")
_DEVICE = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_NETWORK = re.compile(r"[A-Za-z0-9_.-]([A-Za-z0-9_. -]{0,62}[A-Za-z0-9_.-])?")
_PRINTABLE = re.compile(r"[ -~]*")


class Kernel(NamedTuple):
    """A kernel that the hypervisor loads itself: files, and the kernel's command line."""

    path: str
    initramfs: str = ""
    parameters: str = ""


class DiskConfig(NamedTuple):
    """A disk: a file or a block device with its content as it is, without a format. On ESXi: a file of a datastore."""

    path: str
    read_only: bool = False


class Interface(NamedTuple):
    """A network device. `bridge` is what the hypervisor connects it to: a bridge of domain 0, or a port group of ESXi.
    `device` is the name that its other end has in domain 0, if it is to have one. With a `script` the hypervisor leaves
    it to that program of domain 0 to connect the other end (xl-network-configuration(5))."""

    mac: str
    bridge: str = ""
    device: str = ""
    script: str = ""


class GuestConfig(NamedTuple):
    """A guest. `memory` is in MiB. Without a `kernel`, it boots from its first disk. One that does not restart is off
    when its system asks for a restart."""

    name: str
    uuid: str
    memory: int
    cpus: int = 1
    virtualization: Virtualization = "hvm"
    devices: Devices = "para"
    kernel: Kernel | None = None
    disks: Sequence[DiskConfig] = ()
    interfaces: Sequence[Interface] = ()
    restarts: bool = True


class GuestEvent(NamedTuple):
    """A change of a guest's state that the hypervisor has told of."""

    name: str
    what: Literal["defined", "undefined", "started", "paused", "resumed", "stopped", "stopping", "suspended", "crashed"]


class Hypervisor(Protocol):
    @property
    def name(self) -> str:
        """Its name in the settings, as in "xen:///system"."""

    @property
    def type(self) -> Literal[1, 2]: ...

    def check(self) -> str:
        """Say what it is, with its version. Unavailable says why it can't be used, and what to do about it."""

    def close(self) -> None:
        """Close the connection to it. Guests go on running."""


class GuestKeeper(Hypervisor, Protocol):
    """A hypervisor that keeps its guests itself. Besides the errors below, each method raises Unavailable if it can't
    be reached, and Failed if it refuses for another reason."""

    features: frozenset[KeeperFeature]

    def define(self, config: GuestConfig) -> None:
        """Make a guest, which is off. Invalid, Conflict."""

    def undefine(self, name: str) -> None:
        """Forget a guest, which is off; its disks stay. NotFound, Conflict."""

    def start(self, name: str) -> None:
        """NotFound; Conflict if it is not off."""

    def shut_down(self, name: str) -> None:
        """Ask the guest's system to turn it off, which it may ignore. NotFound, Conflict."""

    def kill(self, name: str) -> None:
        """Turn it off at once; nothing happens if it is off. NotFound."""

    def pause(self, name: str) -> None:
        """NotFound, Conflict."""

    def resume(self, name: str) -> None:
        """NotFound, Conflict."""

    def state(self, name: str) -> GuestState:
        """NotFound."""

    def guests(self) -> Mapping[str, GuestState]:
        """All guests, also those that are not of Insula."""

    def attach(self, name: str, device: DiskConfig | Interface) -> None:
        """Add a device to a guest that runs. NotFound, Conflict; Unavailable if the hypervisor can't do that."""

    def detach(self, name: str, device: DiskConfig | Interface) -> None:
        """Remove a device from a guest that runs: the disk with that path, the interface with that MAC address.
        NotFound, Conflict; Unavailable if the hypervisor can't do that."""

    def console(self, name: str) -> Path:
        """The terminal of this host that is the console of a guest that runs. NotFound, Conflict; Unavailable if the
        hypervisor has none."""

    def devices(self, name: str) -> Mapping[str, str]:
        """The network devices of this host that are the other ends of those of a guest that runs, by MAC address.
        NotFound; Unavailable if they are not on this host."""

    def watch(self, on_event: Callable[[GuestEvent], None]) -> Callable[[], None]:
        """Call `on_event` at each change, in a thread of the keeper, until what is returned is called. Events may be
        lost with the connection, so look at states too. Unavailable if the hypervisor tells of none."""


def check_config(config: GuestConfig) -> None:
    """Raise Invalid for what is no guest of any hypervisor."""
    for value, pattern, what, hint in (
        (config.name, _NAME, "name of a guest", "use 1 to 63 of letters, digits, '.', '-' and '_'"),
        (config.uuid, _UUID, "UUID", "as uuid.uuid4() makes it"),
        *((each.mac, _MAC, "MAC address", "as in 52:54:00:12:34:56") for each in config.interfaces),
        *(
            (each.bridge, _NETWORK, "network", "name a bridge, or a port group")
            for each in config.interfaces
            if not each.script
        ),
        *(
            (each.device or "a", _DEVICE, "name of a device", "use 1 to 15 letters and digits")
            for each in config.interfaces
        ),
    ):
        if not pattern.fullmatch(value):
            raise Invalid(f"{value!a} is no {what}", hint)
    if config.memory < LEAST_MEMORY or config.cpus < 1:
        raise Invalid(f"a guest can't have {config.memory} MiB and {config.cpus} processors", "give it more")
    kernel = config.kernel or Kernel("/")
    for text in (kernel.path, kernel.initramfs, kernel.parameters, *(disk.path for disk in config.disks)):
        if not _PRINTABLE.fullmatch(text):
            raise Invalid(f"{text!a} has characters that are not printable ASCII", "leave them out")
    paths = [disk.path for disk in config.disks]
    macs = [each.mac for each in config.interfaces]
    if len({*paths}) < len(paths) or len({*macs}) < len(macs):
        raise Invalid(f"{config.name} has a disk or a MAC address twice", "name each once")


def check_path(path: str, what: str) -> None:
    """Raise Invalid unless it is the absolute path of a file."""
    if not path.startswith("/") or path.endswith("/") or ".." in path.split("/"):
        raise Invalid(f"{what} {path!a} is not the absolute path of a file", "write the whole path")
