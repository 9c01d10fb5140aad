"""The command line of QEMU for a machine of a disk image: a PC with firmware, that boots what is on its disk.

As for other machines every resource is a descriptor, and formats are given (`command_line.py`). Its serial port is
QEMU's standard input and output.

`full` are devices that a PC of old has: any system has drivers for them, and none knows that it is a guest. `para` are
virtio's. Network devices, and further disks if they are virtio's, are in slots that take others while the machine runs
(devices.py). Further disks that are not are on controllers of their own (AHCI), which take none.
"""

from __future__ import annotations

from typing import NamedTuple

from insula.machine.qemu import devices
from insula.machine.qemu.command_line import (
    SANDBOX,
    AcceleratorName,
    GuestDisk,
    GuestInterface,
    backend,
    further_disk,
    processors,
)
from insula.machine.qemu.devices import BRIDGE, CD_SET, HotPlugBus

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

AGENT = "guest-agent"
"""The name of the socket to the agent of QEMU in the guest, if there is one."""
PORT = "org.qemu.guest_agent.0"
"""The name by which it finds its port."""
SCREEN = 99
"""The number of the fd set that a picture of the screen is written to."""
_BRIDGE_AT = 0x1E
_FIRST_OF_OLD = 8
"""The first slot of an old PC's bus in which it has nothing of its own."""
_PORTS = 6  # of an AHCI controller


class DiskMachine(NamedTuple):
    """A machine that boots from `disk`. `memory` is in MiB; `seed` is a small disk for cloud-init; `code` and
    `variables` are of UEFI firmware, without which there is a BIOS; `cdroms` are in the drives for CDs, of which some
    are empty (-1). With `boots_cdrom` the first of these is booted if the disk can't be. `further` are more disks.
    `state` is one to load, with the memory in the file `memory_fd`, as the type `machine` (-machine help): then it
    waits to be told so. All are descriptors, and so are the sockets `qmp` and `agent`."""

    memory: int
    disk: int
    seed: int
    qmp: int = -1
    cpus: int = 1
    devices: str = "para"
    code: int = -1
    variables: int = -1
    interfaces: Sequence[GuestInterface] = ()
    accelerator: AcceleratorName = "tcg"
    cdroms: Sequence[int] = ()
    boots_cdrom: bool = False
    further: Sequence[GuestDisk] = ()
    agent: int = -1
    state: int = -1
    memory_fd: int = -1
    machine: str = ""

    @property
    def full(self) -> bool:
        return self.devices == "full"

    @property
    def old(self) -> bool:
        """Whether it has an old board, without PCI Express."""
        return self.full and self.code < 0

    @property
    def bus(self) -> HotPlugBus:
        """The bus of devices that come and go."""
        return HotPlugBus("pci.0", _FIRST_OF_OLD, "full") if self.old else HotPlugBus(kind=self.devices)

    @property
    def further_slots(self) -> dict[str, int]:
        """The slots of further disks by their names: those that they have been given, or the first ones; 0 for disks
        that can't come or go, which are in none."""
        if self.full:
            return {each.serial: 0 for each in self.further}
        return {each.serial: each.slot or self.bus.for_disks[at] for at, each in enumerate(self.further)}


def arguments(machine: DiskMachine, program: str = "/usr/bin/qemu-system-x86_64") -> list[str]:
    """The command line. Descriptors have the numbers that they have in QEMU."""
    full = machine.full
    return [
        program,
        *("-nodefaults", "-no-user-config", "-display", "none", "-sandbox", SANDBOX),
        *("-vnc", "none"),  # it listens nowhere: each viewer comes as a descriptor
        *processors(machine.accelerator, machine.cpus),
        *("-m", str(machine.memory), "-boot", "strict=on"),  # from what has an index alone
        *backend(machine.memory, machine.memory_fd),
        *_board(machine),
        *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
        *("-chardev", f"socket,id=qmp,fd={machine.qmp}", "-mon", "chardev=qmp,mode=control"),
        *("-device", "VGA"),
        *(() if full else ("-device", "virtio-rng-pci")),
        *_disk(0, machine.disk, "disk", full=full),
        *_disk(1, machine.seed, "seed", full=full),
        *(each for number, fd in enumerate(machine.cdroms) for each in _cdrom(number, fd, machine)),
        *("-device", "piix3-usb-uhci", "-device", "usb-tablet"),  # behind disks, whose places have names
        *(each for interface in machine.interfaces for each in _interface(interface, machine.bus)),
        *(() if full else _agent(machine.agent)),
        *(each for number, disk in enumerate(machine.further) for each in _further_disk(number, disk, machine)),
        *(("-incoming", "defer") if machine.state >= 0 else ()),
    ]


def descriptors(machine: DiskMachine) -> list[int]:
    """All descriptors that QEMU inherits, beside the standard ones and the socket."""
    found = [
        machine.disk,
        machine.seed,
        machine.code,
        machine.variables,
        machine.state,
        machine.memory_fd,
        *machine.cdroms,
        *(each.fd for each in machine.further),
    ]
    return [fd for fd in (*found, *(each.fd for each in machine.interfaces)) if fd >= 0]


def _board(machine: DiskMachine) -> Iterator[str]:
    """An old board with IDE for full virtualization with a BIOS, else one with PCI Express and AHCI."""
    flash = ""
    if machine.code >= 0:
        yield from _file("code", machine.code, read_only=True)
        yield from _file("variables", machine.variables)
        flash = ",pflash0=code,pflash1=variables"
    kind = machine.machine or ("pc" if machine.old else "q35")
    yield from ("-M", f"{kind},smm=off,memory-backend=ram{flash}")
    if machine.bus.name == BRIDGE:
        yield from ("-device", devices.words(devices.bridge(_BRIDGE_AT)))


def _agent(fd: int) -> Iterator[str]:
    """A port for an agent of QEMU in the guest."""
    yield from ("-chardev", f"socket,id={AGENT},fd={fd}", "-device", "virtio-serial-pci,id=serial")
    yield from ("-device", f"virtserialport,chardev={AGENT},name={PORT},bus=serial.0")


def _file(name: str, fd: int, *, read_only: bool = False, number: int = -1) -> Iterator[str]:
    """A block device, raw, of a descriptor, whose fd set has that number or another."""
    access = ",read-only=on" if read_only else ",discard=unmap"
    number = fd if number < 0 else number
    yield from ("-add-fd", f"fd={fd},set={number}")
    yield from ("-blockdev", f"driver=file,filename=/dev/fdset/{number},node-name={name}-file,locking=off{access}")
    yield from ("-blockdev", f"driver=raw,file={name}-file,node-name={name}{access}")


def _disk(number: int, fd: int, name: str, *, full: bool) -> Iterator[str]:
    yield from _file(name, fd)
    kind = f"ide-hd,bus=ide.{number}" if full else "virtio-blk-pci"
    first = "" if number else ",bootindex=0"
    yield from ("-device", f"{kind},drive={name},id={name},serial={name}{first}")


def _further_disk(number: int, disk: GuestDisk, machine: DiskMachine) -> Iterator[str]:
    """One that can be taken out while the machine runs (`insula.machine.shim.disks`), or one of AHCI."""
    if slot := machine.further_slots[disk.serial]:
        yield from further_disk(disk._replace(slot=slot), machine.bus)
        return
    controller, port, node = f"ahci{number // _PORTS}", number % _PORTS, f"further-{number}"
    yield from _file(node, disk.fd)
    if not port:
        yield from ("-device", f"ich9-ahci,id={controller}")
    yield from ("-device", f"ide-hd,bus={controller}.{port},drive={node},id={node},serial={disk.serial}")


def _cdrom(number: int, fd: int, machine: DiskMachine) -> Iterator[str]:
    """A drive that any system has drivers for: IDE, beside the disks on an old board, or AHCI behind them."""
    if fd >= 0:
        yield from _file(f"cdrom{number}", fd, read_only=True, number=CD_SET + number)
    place = f"ide.{number},unit=1" if machine.old else f"ide.{number + 2 if machine.full else number}"
    medium = f",drive=cdrom{number}" if fd >= 0 else ""
    first = ",bootindex=1" if machine.boots_cdrom and not number else ""
    yield from ("-device", f"ide-cd,bus={place}{medium},id=cdrom{number}{first}")


def _interface(interface: GuestInterface, bus: HotPlugBus) -> Iterator[str]:
    name = devices.network_name(interface.slot)
    way = f"tap,id={name},fd={interface.fd}" if interface.fd >= 0 else f"hubport,id={name},hubid={interface.slot}"
    yield from ("-netdev", way)
    yield from ("-device", devices.words(bus.network_device(interface.slot, interface.mac, interface.mtu)))
