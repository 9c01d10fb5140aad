"""Guests of Xen as domains of libvirt, for its driver libxl (https://libvirt.org/drvxen.html).

| | pv | pvh | hvm |
|---|---|---|---|
| os type, machine | linux, xenpv | xenpvh, xenpvh | hvm, xenfv |
| boots | a kernel | a kernel | a kernel, or its first disk by firmware |
| disks, interfaces | para: xvda, netfront | para | para; full: IDE, e1000, emulated by a QEMU in domain 0 |
| console | xen | xen | serial |
"""

from __future__ import annotations

from pathlib import Path
from typing import Final
from xml.etree.ElementTree import Element

from insula.machine.hypervisor import Devices, DiskConfig, GuestConfig, Interface, check_config, check_path
from insula.machine.libvirt import elements
from insula.machine.libvirt.elements import DiskTarget, add
from insula.model.errors import Invalid

_CAPABILITIES: Final = Path("/proc/xen/capabilities")
_SYSTEMS: Final = {"pv": ("linux", "xenpv"), "pvh": ("xenpvh", "xenpvh"), "hvm": ("hvm", "xenfv")}
_MOST_DISKS: Final[dict[Devices, int]] = {"para": 16, "full": 4}  # IDE: two on each of two channels


def domain(config: GuestConfig) -> Element:
    """The domain of a guest. Invalid for one that Xen can't have."""
    _check(config)
    made = elements.domain("xen", config)
    system = add(made, "os")
    kind, machine = _SYSTEMS[config.virtualization]
    add(system, "type", kind, arch="x86_64", machine=machine)
    if config.kernel:
        elements.boot(system, config.kernel)
    else:
        add(system, "boot", dev="hd")
    if config.virtualization == "hvm":
        features = add(made, "features")
        for name in ("acpi", "apic", "pae"):
            add(features, name)
    add(made, "clock", offset="utc")
    elements.ends(made, restarts=config.restarts)
    devices = add(made, "devices")
    for number, each in enumerate(config.disks):
        devices.append(_disk(each, config.devices, number))
    for nic in config.interfaces:
        devices.append(_interface(nic, config))
    if config.virtualization == "hvm":
        add(add(devices, "serial", type="pty"), "target", port="0")
    console = add(devices, "console", type="pty")
    add(console, "target", type="serial" if config.virtualization == "hvm" else "xen", port="0")
    return made


def device(config: DiskConfig | Interface, number: int) -> Element:
    """A device to add to a guest that runs: `number` is how many of its kind it has. Those are para-virtualized."""
    if isinstance(config, DiskConfig):
        return _disk(config, "para", number)
    return elements.interface(config, None)


def domain_of_this_host() -> str:
    """What this host is to Xen. Only domain 0 has control of it."""
    try:
        control = "control_d" in _CAPABILITIES.read_text()
    except OSError:
        return "this host does not run on it"
    return "this host is its domain 0" if control else "this host is a guest of it"


def _disk(config: DiskConfig, devices: Devices, number: int) -> Element:
    prefix, bus = ("xvd", "xen") if devices == "para" else ("hd", "ide")
    target = DiskTarget(prefix + "abcdefghijklmnop"[number], bus)
    # domain 0's kernel serves files and devices itself ("phy"), with a loop device for a file; QEMU serves IDE disks
    kind = "block" if config.path.startswith("/dev/") else "file"
    return elements.disk(config, kind, "phy" if kind == "block" else None, target)


def _interface(config: Interface, guest: GuestConfig) -> Element:
    if guest.virtualization != "hvm":
        return elements.interface(config, None)
    return elements.interface(config, "netfront" if guest.devices == "para" else "e1000")


def _check(config: GuestConfig) -> None:
    check_config(config)
    how = config.virtualization
    if how != "hvm" and config.devices == "full":
        raise Invalid(f"a guest of kind {how} has no emulated devices", "use hvm, or leave out full")
    if how != "hvm" and config.kernel is None:
        raise Invalid(f"a guest of kind {how} needs a kernel", "name one; only hvm boots from a disk")
    if how == "hvm" and config.kernel is None and not config.disks:
        raise Invalid(f"{config.name} has neither a kernel nor a disk to boot from", "give it one")
    if len(config.disks) > (most := _MOST_DISKS[config.devices]):
        raise Invalid(f"{config.name} can't have {len(config.disks)} disks", f"{most} at most")
    if config.kernel:
        check_path(config.kernel.path, "the kernel")
        if config.kernel.initramfs:
            check_path(config.kernel.initramfs, "the initramfs")
    for disk in config.disks:
        check_path(disk.path, "the disk")
    for each in config.interfaces:
        if each.script:
            check_path(each.script, "the script")
