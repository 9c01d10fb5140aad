"""Devices that a machine gets and loses while it runs: how many, where they are, and their properties.

The own bus of a PC with PCI Express takes no device then (docs/pcie.txt of QEMU), so network devices and further disks
are behind a bridge. One conventional PCI bridge has 31 slots, and costs a start nothing; ports of PCI Express cost it
1.5 ms each. The bus of an old PC takes them itself. The guest learns of a device by ACPI, and is asked the same way to
let go of it.

Processors and memory have places for what may come as well. A copy has the places of its template, so they are the same
for all machines: a place for a processor takes some 0.3 MiB of the guest, and those for memory nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

BRIDGE = "bridge"
SLOTS = range(1, 32)
"""Slots of a bus; 0 is a bridge's own."""
CD_SET = 100
"""The number of the fd set of the CD in drive 0."""
DISK_SET = 200
"""The number of the fd set of the disk in slot 0; other disks have lower ones."""
MOST_NETWORKS = 8
MOST_CPUS = 8
"""Processors that a machine may have without another start, if it does not have more at its start."""
MOST_MEMORY = 16 << 10
"""MiB of memory that a machine may have, with what is plugged in."""
MODULES = 16
"""Places for modules of memory (DIMMs)."""
BLOCK = 128
"""MiB: Linux takes memory in such blocks, and not smaller (Documentation/admin-guide/mm/memory-hotplug.rst)."""


def network_name(slot: int) -> str:
    """The name of the network device in a slot."""
    return f"net{slot}"


def disk_name(slot: int) -> str:
    """The name of the further disk in a slot."""
    return f"further{slot}"


class HotPlugBus(NamedTuple):
    """A bus whose slots take devices that come and go, from `first` on. Its devices are virtio's, without the interface
    of drivers from before version 1 of virtio (`modern`) or with it (`para`), or a PC's (`full`)."""

    name: str = BRIDGE
    first: int = 1
    kind: str = "modern"

    @property
    def slots(self) -> range:
        return range(self.first, SLOTS.stop)

    @property
    def for_disks(self) -> range:
        """The slots that are disks' first; those before are networks'."""
        return range(self.first + MOST_NETWORKS, SLOTS.stop)

    def network_device(self, slot: int, mac: str, mtu: int) -> dict[str, Any]:
        """The properties of a network device in a slot, whose other end is the netdev of the same name."""
        name = network_name(slot)
        card = {"driver": "e1000"} if self.kind == "full" else {"driver": "virtio-net-pci", "host_mtu": mtu}
        return card | {"netdev": name, "id": name, "mac": mac, "romfile": ""} | self._place(slot)

    def disk(self, slot: int, serial: str) -> dict[str, Any]:
        """The properties of a disk of virtio in a slot, with a serial number, whose content is the block node of the
        same name."""
        name = disk_name(slot)
        return {"driver": "virtio-blk-pci", "drive": name, "id": name, "serial": serial} | self._place(slot)

    def _place(self, slot: int) -> dict[str, Any]:
        modern = {"disable-legacy": "on"} if self.kind == "modern" else {}
        return {"bus": self.name, "addr": f"{slot:#x}"} | modern


BUS = HotPlugBus()
"""That of machines of container images."""


def bridge(place: int | None = None) -> dict[str, Any]:
    """The properties of the bridge, at a place on the machine's own bus."""
    return {"driver": "pcie-pci-bridge", "id": BRIDGE} | ({} if place is None else {"addr": f"{place:#x}"})


def memory(number: int, size: int) -> dict[str, Any]:
    """The properties of the memory of a module, an object of its own; `size` is in MiB."""
    return {"qom-type": "memory-backend-ram", "id": f"module{number}", "size": size << 20}


def module(number: int) -> dict[str, Any]:
    """The properties of a module with that memory."""
    return {"driver": "pc-dimm", "id": f"dimm{number}", "memdev": f"module{number}"}


def processor(model: str, number: int) -> dict[str, Any]:
    """The properties of a processor that was plugged in, of a model as of -cpu; the first one has number 0."""
    return {"driver": f"{model}-x86_64-cpu", "id": f"cpu{number}", "socket-id": 0, "core-id": number, "thread-id": 0}


def words(properties: dict[str, Any]) -> str:
    """Properties as a word of the command line."""
    kind, *rest = properties.items()
    return ",".join([kind[1], *(f"{name}={value}" for name, value in rest)])
