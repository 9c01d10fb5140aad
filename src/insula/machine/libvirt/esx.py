"""Guests of ESXi as domains of libvirt, for its driver esx (https://libvirt.org/drvesx.html).

ESXi has full virtualization only: a guest is a PC with firmware, that boots from its first disk. Its disks are files of
a datastore, as in "[datastore1] web/web.vmdk", and its networks are port groups. Devices are para-virtualized (PVSCSI,
VMXNET3) or such as real machines have (LSI Logic, e1000).
"""

from __future__ import annotations

import re
from typing import Final
from xml.etree.ElementTree import Element

from insula.machine.hypervisor import Devices, DiskConfig, GuestConfig, Interface, check_config
from insula.machine.libvirt import elements
from insula.machine.libvirt.elements import DiskTarget, add
from insula.model.errors import Invalid

_CONTROLLERS: Final[dict[Devices, str]] = {"para": "vmpvscsi", "full": "lsilogic"}
_MODELS: Final[dict[Devices, str]] = {"para": "vmxnet3", "full": "e1000"}
_MEMORY_UNIT = 4  # MiB
_MOST_DISKS, _MOST_INTERFACES = 15, 10
_PATH = re.compile(r"\[[A-Za-z0-9_. -]+\] [A-Za-z0-9_.-]+(/[A-Za-z0-9_. -]+)*\.vmdk")


def domain(config: GuestConfig) -> Element:
    """The domain of a guest. Invalid for one that ESXi can't have."""
    _check(config)
    made = elements.domain("vmware", config)
    add(add(made, "os"), "type", "hvm", arch="x86_64")
    add(made, "clock", offset="utc")
    elements.ends(made)
    devices = add(made, "devices")
    for number, disk in enumerate(config.disks):
        devices.append(_disk(disk, number))
    if config.disks:
        add(devices, "controller", type="scsi", index="0", model=_CONTROLLERS[config.devices])
    for nic in config.interfaces:
        devices.append(elements.interface(nic, _MODELS[config.devices]))
    return made


def device(config: DiskConfig | Interface, number: int) -> Element:
    """A device to add to a guest that runs, which libvirt's driver can't do: it says so itself."""
    return _disk(config, number) if isinstance(config, DiskConfig) else elements.interface(config, _MODELS["para"])


def _disk(config: DiskConfig, number: int) -> Element:
    # the seventh place of a SCSI bus is the controller's own
    return elements.disk(config, "file", None, DiskTarget(f"sd{'abcdefghijklmno'[number]}", "scsi"))


def _check(config: GuestConfig) -> None:
    check_config(config)
    if config.virtualization != "hvm" or config.kernel:
        raise Invalid("ESXi boots its guests from a disk, by full virtualization", "use hvm, without a kernel")
    if not config.disks or len(config.disks) > _MOST_DISKS:
        raise Invalid(f"a guest of ESXi can't have {len(config.disks)} disks", f"1 to {_MOST_DISKS}")
    if len(config.interfaces) > _MOST_INTERFACES:
        raise Invalid(f"a guest of ESXi can't be on {len(config.interfaces)} networks", f"{_MOST_INTERFACES} at most")
    if any(each.script for each in config.interfaces):
        raise Invalid("a guest of ESXi has no script for its network", "name a port group")
    if config.memory % _MEMORY_UNIT:
        raise Invalid(f"ESXi can't give a guest {config.memory} MiB", f"use a multiple of {_MEMORY_UNIT} MiB")
    for disk in config.disks:
        if not _PATH.fullmatch(disk.path):
            raise Invalid(f"{disk.path!a} is no disk of a datastore", "as in '[datastore1] web/web.vmdk'")
        if disk.read_only:
            raise Invalid(f"ESXi can't give a guest the disk {disk.path!a} read-only", "leave that out")
