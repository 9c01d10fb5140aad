"""The command line of QEMU for one machine, as data.

QEMU is given every resource as a descriptor, so that it needs no path of the host, and can be confined before it
starts. A descriptor of a disk becomes a member of an *fd set*, which `-blockdev` opens as /dev/fdset/N; a file of
memory is opened through /proc/self/fd. Formats are given, never probed: a guest may write anything into its disk, also
the header of another format (CVE-2024-4467).

`-nodefaults` and `-no-user-config`: nothing is there that is not listed here.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from insula.machine.qemu import devices
from insula.machine.qemu.devices import HotPlugBus

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

AcceleratorName = Literal["kvm", "tcg"]
KERNEL_PARAMETERS = (
    "console=ttyS0 quiet panic=-1 rdinit=/init lsm=landlock,yama swiotlb=noforce memhp_default_state=online"
)
"""Of a guest with the agent, which loads no policy for other security modules: they would only look at each call. A
machine that may get more memory would set aside 64 MiB for devices that reach only the lower 4 GiB (swiotlb); it has
none. Memory that is plugged in is used at once."""
_TRANSLATED = "mitigations=off nokaslr no_timer_check tsc=reliable"
"""Where processors are translated. What protects programs of a kernel from each other (mitigations) costs much there;
KASLR is the same for all copies of one machine anyway."""
TRANSLATIONS = 64
"""MiB of translated code that the emulator keeps at most, which count as the machine's overhead. A start makes half of
that; with less room, it would be thrown away and made again."""
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


class GuestDisk(NamedTuple):
    """A disk, as an open descriptor. `serial` is how the guest tells it from others. A further disk has a slot
    (devices.py)."""

    serial: str
    fd: int
    read_only: bool = False
    slot: int = 0


class GuestInterface(NamedTuple):
    """A network device: the descriptor of a tap, or -1 for one without a cable, and its slot (devices.py)."""

    mac: str
    fd: int = -1
    mtu: int = 1500
    slot: int = 1


class MachineConfig(NamedTuple):
    """A machine with the agent, and para-virtualized devices.

    `memory` is in MiB, and so are `modules`, those that were plugged in, as `plugged` processors beside `cpus` were.
    `further` disks were plugged in too, unlike `disks`.
    `memory_fd` is a file with the memory: a template writes it (`shared`), a clone maps a copy of its pages on demand.
    `agent`, `qmp` and `console` are sockets, or -1. `state` is a descriptor of one to load: then it waits to be told
    so, as one that is `arriving` from another host does, which stands still then. `machine` is the type of machine
    (-machine help).
    """

    kernel: str
    initramfs: str
    memory: int
    agent: int
    qmp: int
    cpus: int = 1
    disks: Sequence[GuestDisk] = ()
    further: Sequence[GuestDisk] = ()
    interfaces: Sequence[GuestInterface] = ()
    memory_fd: int = -1
    shared: bool = False
    console: int = -1
    state: int = -1
    accelerator: AcceleratorName = "tcg"
    machine: str = "q35"
    modules: Sequence[int] = ()
    plugged: int = 0
    arriving: bool = False


def arguments(config: MachineConfig, program: str = "/usr/bin/qemu-system-x86_64") -> list[str]:
    """The command line. Descriptors have the numbers that they have in QEMU."""
    return [
        program,
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-sandbox", SANDBOX),
        *processors(config.accelerator, config.cpus, devices.MOST_CPUS),
        *_memory(config),
        *(each for number, size in enumerate(config.modules) for each in _module(number, size)),
        *(each for number in range(config.cpus, config.cpus + config.plugged) for each in _processor(config, number)),
        *("-kernel", config.kernel, "-initrd", config.initramfs),
        *("-append", f"{KERNEL_PARAMETERS} {_TRANSLATED}" if config.accelerator == "tcg" else KERNEL_PARAMETERS),
        *_sockets(config),
        *("-device", "virtio-rng-pci", "-device", devices.words(devices.bridge())),
        *(each for number, disk in enumerate(config.disks) for each in _disk(number, disk)),
        *(each for interface in config.interfaces for each in _interface(interface)),
        *(each for disk in config.further for each in further_disk(disk, devices.BUS)),
        *(("-incoming", "defer") if config.state >= 0 or config.arriving else ()),
        *(("-S",) if config.arriving else ()),
    ]


def descriptors(config: MachineConfig) -> list[int]:
    """All descriptors that QEMU inherits."""
    sockets = [config.agent, config.qmp, config.console, config.memory_fd, config.state]
    disks = [*config.disks, *config.further]
    found = [*sockets, *(disk.fd for disk in disks), *(each.fd for each in config.interfaces)]
    return [fd for fd in found if fd >= 0]


def processors(accelerator: AcceleratorName, cpus: int, most: int = 0) -> Iterator[str]:
    """The words for how many processors there are, and may be later, and how they are made."""
    if accelerator == "kvm":
        yield from ("-accel", "kvm", "-cpu", "host")
    else:
        yield from ("-accel", f"tcg,thread=multi,tb-size={TRANSLATIONS}", "-cpu", "max")
    yield from ("-smp", f"{cpus},maxcpus={max(cpus, most)}")


def _memory(config: MachineConfig) -> Iterator[str]:
    """The memory has the same name in all machines, by which a snapshot of one is loaded into another."""
    room = f"slots={devices.MODULES},maxmem={devices.MOST_MEMORY}M"
    yield from ("-m", f"{config.memory},{room}", "-M", f"{config.machine},memory-backend=ram")
    yield from backend(config.memory, config.memory_fd, shared=config.shared)


def backend(memory: int, file: int = -1, *, shared: bool = False) -> Iterator[str]:
    """The words for so many MiB of memory with the name ram: of its own, or a file's, of which it sees a copy unless it
    is `shared`."""
    if file < 0:
        yield from ("-object", f"memory-backend-ram,id=ram,size={memory}M")
        return
    source = f"mem-path=/proc/self/fd/{file},share={'on' if shared else 'off'}"
    yield from ("-object", f"memory-backend-file,id=ram,size={memory}M,{source}")


def _processor(config: MachineConfig, number: int) -> Iterator[str]:
    model = "host" if config.accelerator == "kvm" else "max"
    yield from ("-device", devices.words(devices.processor(model, number)))


def _module(number: int, size: int) -> Iterator[str]:
    yield from ("-object", devices.words(devices.memory(number, size)))
    yield from ("-device", devices.words(devices.module(number)))


def _sockets(config: MachineConfig) -> Iterator[str]:
    if config.console >= 0:
        yield from ("-add-fd", f"fd={config.console},set=99", "-chardev", "file,id=console,path=/dev/fdset/99")
    else:
        yield from ("-chardev", "null,id=console")
    yield from ("-serial", "chardev:console")
    yield from ("-chardev", f"socket,id=qmp,fd={config.qmp}", "-mon", "chardev=qmp,mode=control")
    yield from ("-chardev", f"socket,id=agent,fd={config.agent}", "-device", "virtio-serial-pci,id=serial")
    yield from ("-device", "virtserialport,chardev=agent,name=insula.agent,bus=serial.0")


def _disk(number: int, disk: GuestDisk) -> Iterator[str]:
    access = ",read-only=on" if disk.read_only else ",discard=unmap"
    yield from ("-add-fd", f"fd={disk.fd},set={number}")
    yield from ("-blockdev", f"driver=file,filename=/dev/fdset/{number},node-name=file{number},locking=off{access}")
    yield from ("-blockdev", f"driver=raw,file=file{number},node-name=disk{number}{access}")
    yield from ("-device", f"virtio-blk-pci,drive=disk{number},id=disk{number},serial={disk.serial}")


def further_disk(disk: GuestDisk, bus: HotPlugBus) -> Iterator[str]:
    """The words for a further disk, which are those for one that comes while the machine runs
    (`insula.machine.shim.disks`): it may go then."""
    node, number = devices.disk_name(disk.slot), devices.DISK_SET + disk.slot
    yield from ("-add-fd", f"fd={disk.fd},set={number}")
    where = f"filename=/dev/fdset/{number},node-name={node}-file,locking=off,discard=unmap"
    yield from ("-blockdev", f"driver=file,{where}")
    yield from ("-blockdev", f"driver=raw,file={node}-file,node-name={node},discard=unmap")
    yield from ("-device", devices.words(bus.disk(disk.slot, disk.serial)))


def _interface(interface: GuestInterface) -> Iterator[str]:
    name = f"net{interface.slot}"
    way = f"tap,id={name},fd={interface.fd}" if interface.fd >= 0 else f"hubport,id={name},hubid={interface.slot}"
    yield from ("-netdev", way)
    yield from ("-device", devices.words(devices.BUS.network_device(interface.slot, interface.mac, interface.mtu)))
