"""The command line of QEMU for one machine, as data.

QEMU is given every resource as a descriptor, so that it needs no path of the host, and can be confined before it
starts. A descriptor of a disk becomes a member of an *fd set*, which `-blockdev` opens as /dev/fdset/N; a file of
memory is opened through /proc/self/fd. Formats are given, never probed: a guest may write anything into its disk, also
the header of another format (CVE-2024-4467).

`-nodefaults` and `-no-user-config`: nothing is there that is not listed here.
"""

from __future__ import annotations

from typing import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

KERNEL_PARAMETERS = "console=ttyS0 quiet panic=-1 rdinit=/init mitigations=off nokaslr no_timer_check tsc=reliable"
"""Of a guest with the agent. What protects programs of a kernel from each other (mitigations) costs much where the
machine is emulated; KASLR is the same for all copies of one machine anyway."""
TRANSLATIONS = 32
"""MiB of translated code that the emulator keeps: more is not faster, and counts as the machine's overhead."""
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


class GuestDisk(NamedTuple):
    """A disk, as an open descriptor. `serial` is how the guest tells it from others."""

    serial: str
    fd: int
    read_only: bool = False


class GuestInterface(NamedTuple):
    """A network device: the descriptor of a tap, or -1 for one without a cable."""

    mac: str
    fd: int = -1
    mtu: int = 1500


class MachineConfig(NamedTuple):
    """A machine with the agent, and para-virtualized devices.

    `memory` is in MiB. `memory_fd` is a file with the memory: a template writes it (`shared`), a clone maps a copy of
    its pages on demand. `agent`, `qmp` and `console` are sockets, or -1. `state` is a
    descriptor of one to load: then it waits to be told so.
    """

    kernel: str
    initramfs: str
    memory: int
    agent: int
    qmp: int
    cpus: int = 1
    disks: Sequence[GuestDisk] = ()
    interfaces: Sequence[GuestInterface] = ()
    memory_fd: int = -1
    shared: bool = False
    console: int = -1
    state: int = -1
    accelerator: str = f"tcg,thread=multi,tb-size={TRANSLATIONS}"
    processor: str = "max"


def arguments(config: MachineConfig, program: str = "/usr/bin/qemu-system-x86_64") -> list[str]:
    """The command line. Descriptors have the numbers that they have in QEMU."""
    return [
        program,
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-sandbox", SANDBOX),
        *("-accel", config.accelerator, "-cpu", config.processor, "-smp", str(config.cpus)),
        *_memory(config),
        *("-kernel", config.kernel, "-initrd", config.initramfs, "-append", KERNEL_PARAMETERS),
        *_sockets(config),
        *("-device", "virtio-rng-pci"),
        *(each for number, disk in enumerate(config.disks) for each in _disk(number, disk)),
        *(each for number, interface in enumerate(config.interfaces) for each in _interface(number, interface)),
        *(("-incoming", "defer") if config.state >= 0 else ()),
    ]


def descriptors(config: MachineConfig) -> list[int]:
    """All descriptors that QEMU inherits."""
    sockets = [config.agent, config.qmp, config.console, config.memory_fd, config.state]
    found = [*sockets, *(disk.fd for disk in config.disks), *(each.fd for each in config.interfaces)]
    return [fd for fd in found if fd >= 0]


def _memory(config: MachineConfig) -> Iterator[str]:
    yield from ("-m", str(config.memory))
    if config.memory_fd < 0:
        yield from ("-M", "q35")
        return
    file = f"mem-path=/proc/self/fd/{config.memory_fd},share={'on' if config.shared else 'off'}"
    yield from ("-M", "q35,memory-backend=ram")
    yield from ("-object", f"memory-backend-file,id=ram,size={config.memory}M,{file}")


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


def _interface(number: int, interface: GuestInterface) -> Iterator[str]:
    way = f"tap,id=net{number},fd={interface.fd}" if interface.fd >= 0 else f"hubport,id=net{number},hubid={number}"
    yield from ("-netdev", way)
    device = f"virtio-net-pci,netdev=net{number},id=net{number},mac={interface.mac},host_mtu={interface.mtu},romfile="
    yield from ("-device", device)
