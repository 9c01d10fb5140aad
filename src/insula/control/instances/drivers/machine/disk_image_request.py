"""`DiskImageRequests`: the plan of a machine of a disk image, and what its spec may have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from insula.control.instances.drivers.container.directory import ContainerDirectory
from insula.control.instances.drivers.machine import network, stored
from insula.control.instances.drivers.machine.request import FURTHER, MachineRequests, MachineStart, plan_descriptor
from insula.control.instances.drivers.machine.sizes import check_size, size
from insula.machine.qemu import disk_machine, root
from insula.machine.qemu.command_line import GuestDisk, GuestInterface
from insula.machine.qemu.disk_machine import DiskMachine
from insula.machine.shim.start import AGENT, QMP
from insula.model.disk_images import DiskRoot
from insula.model.disks import FurtherDisk
from insula.model.errors import Invalid, Unavailable
from insula.model.objects import Instance, InstanceSpec, MachineOptions, Network, Tenant, disks_of
from insula.model.units import format_size
from insula.model.views import ExecSpec

SEED: Final = "seed"
_MIB: Final = 1 << 20
_HINT: Final = "use its serial console (insula attach, insula logs), or its network"
_NOBODY: Final = "52:54:00:00:00:00"
"""The MAC address of a device that the machine did not let go of, before its state is loaded."""
_EMPTY: Final = 20 << 30
"""Bytes of the disk of an instance that a system is to be installed on."""
_OF_PROGRAMS: Final = {
    "command": "a command",
    "entrypoint": "--entrypoint",
    "env": "--env",
    "user": "--user",
    "working_dir": "--workdir",
    "mounts": "--tmpfs",
    "read_only": "--read-only",
    "extra_hosts": "--add-host",
    "dns": "--dns",
    "dns_search": "--dns-search",
    "healthcheck": "--health-cmd",
}
"""Fields of a spec that a machine without an agent can't have."""


class DiskImageRequests(MachineRequests):
    """Makes requests to the runtime, as `MachineRequests` does for machines with the agent."""

    def oci(
        self, tenant: Tenant, instance: Instance, spec: InstanceSpec, directory: ContainerDirectory
    ) -> tuple[list[str], dict[str, Any]]:
        """Nothing: there is no program to run in the guest. Invalid."""
        check(instance.spec, disk_of(instance))
        return [], {"process": {}}

    def process(self, tenant: Tenant, instance: Instance, wanted: ExecSpec) -> dict[str, Any]:
        raise no_agent(instance.name, "exec")

    def plan(
        self, instance: Instance, networks: Sequence[Network], program: dict[str, Any], start: MachineStart
    ) -> int:
        """A descriptor of the plan (`insula.machine.shim.disk_machine`)."""
        of, resumed, disk = start.descriptors, start.resumed, disk_of(instance)
        further = [(each.name, 0) for each in disks_of(instance.spec)]
        if resumed:
            further = [(each.disk.name, each.slot) for each in resumed.further]
        machine = DiskMachine(
            **size(instance.spec)._asdict(),
            disk=of["disk"],
            seed=of["seed"],
            code=of.get("code", -1),
            variables=of.get("variables", -1),
            qmp=QMP,
            agent=AGENT,
            state=of.get("state", -1),
            memory_fd=of.get("memory", -1),
            machine=resumed.machine if resumed else "",
            devices=devices(instance),
            accelerator=start.accelerator,
            cdroms=[of.get(cd_name(drive), -1) for drive in range(disk.drives)],
            boots_cdrom=disk.media == "cdrom" and disk.cds[0] is not None,
            further=[GuestDisk(name, of[FURTHER + name], slot=slot) for name, slot in further],
        )
        ports = instance.plugged
        slots = resumed.slots if resumed else [machine.bus.first + network.number(port) for port in ports]
        machine = machine._replace(
            interfaces=[
                GuestInterface(port.mac, of.get(port.interface, -1), each.mtu, slot)
                for port, each, slot in zip(ports, networks, slots, strict=False)
            ]
            + [GuestInterface(_NOBODY, slot=slot) for slot in slots[len(ports) :]]
        )
        plan = {
            "disk_machine": True,
            "command": disk_machine.arguments(machine, root.QEMU),
            "descriptors": disk_machine.descriptors(machine),
            "state": of.get("state", -1),
            "network": network.plan(ports, networks),
            "slots": [*zip(slots, [*(port.index for port in ports), *([None] * len(slots))], strict=False)],
            "further": {name: (slot, None) for name, slot in machine.further_slots.items()},
            "bus": machine.bus,
            "cds": [cd and cd.digest for cd in disk.cds],
            "identity": {"generation": start.generation},
            "disk": (self.directory(instance.id).layer / stored.DISK).stat().st_size,
            "memory": machine.memory,
            "modules": [],
            "cpus": machine.cpus,
            "plugged": 0,
        }
        return plan_descriptor(plan)


def cd_name(drive: int) -> str:
    """The name of the descriptor of the CD in a drive."""
    return f"cdrom {drive}"


def no_agent(name: str, verb: str) -> Unavailable:
    """The error of verbs that an agent in the guest would have to carry out."""
    return Unavailable(f"{name} runs a disk image, in which there is no agent of Insula for {verb}", _HINT)


def disk_of(instance: Instance) -> DiskRoot:
    """The disk of the instance's image."""
    assert isinstance(instance.root, DiskRoot)
    return instance.root


def devices(instance: Instance) -> str:
    """The devices of a machine: those that its spec asks for, else those of its image."""
    options = instance.spec.options
    return (isinstance(options, MachineOptions) and options.devices) or disk_of(instance).devices


def disk_size(spec: InstanceSpec, disk: DiskRoot) -> int:
    """The size of a machine's disk in bytes: that of the image, or a larger one that is asked for."""
    asked = (spec.resources.disk or 0) // _MIB * _MIB
    return (asked or _EMPTY) if disk.media == "cdrom" else max(disk.size, asked)


def check(spec: InstanceSpec, disk: DiskRoot) -> None:
    """Raise Invalid for what a machine of this disk can't have."""
    check_size(spec)
    for name, option in _OF_PROGRAMS.items():
        if getattr(spec, name):
            what = f"{option} is for programs of Insula's agent, and there is none in a disk image"
            raise Invalid(what, "leave it out; --user-data tells cloud-init what to do")
    limit = spec.resources.disk
    if disk.media == "disk" and limit is not None and limit < disk.size:
        what = f"the disk of the image has {format_size(disk.size)}, and the instance may have {format_size(limit)}"
        raise Invalid(what, f"use --disk {format_size(disk.size)} or more")
    options = spec.options
    if isinstance(options, MachineOptions) and (options.cold or options.group_add or options.privileged):
        raise Invalid("--cold, --privileged and --group-add are of machines of container images", "leave it out")
    check_further(disks_of(spec))


def check_further(disks: Sequence[FurtherDisk]) -> None:
    """Raise Invalid for further disks that a machine without an agent can't have."""
    for each in disks:
        if each.mount:
            what = f"disk {each.name} would be mounted by Insula's agent, and there is none in a disk image"
            raise Invalid(what, "leave out --mount, and have the system in it mount the disk")
        if each.name == SEED:
            raise Invalid(f"a disk of a disk image can't have the name {each.name}", "choose another one")
