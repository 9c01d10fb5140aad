"""Domains of libvirt as trees of elements (https://libvirt.org/formatdomain.html), what all hypervisors have in common.

Text is only put into a tree here, and never into XML, so no name can end an element.
"""

from __future__ import annotations

from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement, fromstring, tostring

from insula.machine.hypervisor import DiskConfig, GuestConfig, Interface, Kernel


class DiskTarget(NamedTuple):
    """Where a guest sees a disk: the name of its device, and the bus."""

    device: str
    bus: str


def add(parent: Element, tag: str, text: str | None = None, **attributes: str) -> Element:
    """Append an element, and return it."""
    made = SubElement(parent, tag, attributes)
    made.text = text
    return made


def domain(kind: str, config: GuestConfig) -> Element:
    """A domain with its name, memory and processors, and with what happens when it ends: it is off."""
    made = Element("domain", {"type": kind})
    add(made, "name", config.name)
    add(made, "uuid", config.uuid)
    add(made, "memory", str(config.memory), unit="MiB")
    add(made, "currentMemory", str(config.memory), unit="MiB")
    add(made, "vcpu", str(config.cpus))
    return made


def ends(made: Element, *, restarts: bool = True) -> None:
    """What happens when the guest turns itself off, restarts, or crashes."""
    add(made, "on_poweroff", "destroy")
    add(made, "on_reboot", "restart" if restarts else "destroy")
    add(made, "on_crash", "destroy")


def boot(system: Element, kernel: Kernel) -> None:
    """The kernel that the hypervisor loads."""
    add(system, "kernel", kernel.path)
    if kernel.initramfs:
        add(system, "initrd", kernel.initramfs)
    if kernel.parameters:
        add(system, "cmdline", kernel.parameters)


def disk(config: DiskConfig, kind: str, driver: str | None, target: DiskTarget) -> Element:
    """A disk, of kind "file" or "block", with the content as it is."""
    made = Element("disk", {"type": kind, "device": "disk"})
    if driver:
        add(made, "driver", name=driver, type="raw")
    add(made, "source", **{"dev" if kind == "block" else "file": config.path})
    add(made, "target", dev=target.device, bus=target.bus)
    if config.read_only:
        add(made, "readonly")
    return made


def interface(config: Interface, model: str | None) -> Element:
    """A network device, on a bridge or connected by a script."""
    made = Element("interface", {"type": "ethernet" if config.script else "bridge"})
    add(made, "mac", address=config.mac)
    if config.script:
        add(made, "script", path=config.script)
    else:
        add(made, "source", bridge=config.bridge)
    if config.device:
        add(made, "target", dev=config.device)
    if model:
        add(made, "model", type=model)
    return made


def text(element: Element) -> str:
    return tostring(element, encoding="unicode")


def devices(domain_text: str, tag: str) -> list[Element]:
    """The devices of a kind, "disk" or "interface", of a domain that runs."""
    return fromstring(domain_text).findall(f"./devices/{tag}")


def find(domain_text: str, wanted: DiskConfig | Interface) -> str | None:
    """The device of a domain that runs: the disk with that path, or the interface with that MAC address."""
    tag = "disk" if isinstance(wanted, DiskConfig) else "interface"
    for each in devices(domain_text, tag):
        for source in each.iter("source" if isinstance(wanted, DiskConfig) else "mac"):
            known = source.get("address") if isinstance(wanted, Interface) else source.get("file") or source.get("dev")
            if known == (wanted.path if isinstance(wanted, DiskConfig) else wanted.mac):
                return text(each)
    return None


def ends_of_interfaces(domain_text: str) -> dict[str, str]:
    """The names of the devices of this host behind a domain's interfaces, by MAC address."""
    found: dict[str, str] = {}
    for each in devices(domain_text, "interface"):
        mac, target = each.find("mac"), each.find("target")
        if mac is not None and target is not None:
            found[mac.get("address", "")] = target.get("dev", "")
    return found


def console(domain_text: str) -> str | None:
    """The path of the terminal that is the console of a domain that runs."""
    found = fromstring(domain_text).find("./devices/console")
    return None if found is None else found.get("tty")
