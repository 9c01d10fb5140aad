"""`MachineRequests`: the program of a machine, its container, and the plan with which the shim brings them together."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from insula.container.service.client import Launch
from insula.control.instances.drivers.container import spec
from insula.control.instances.drivers.container.directory import ContainerDirectory
from insula.control.instances.drivers.container.etc_files import etc_files
from insula.control.instances.drivers.container.request import Requests
from insula.control.instances.drivers.container.users import User
from insula.control.instances.drivers.directory import boot_id
from insula.control.instances.drivers.machine import disk, jail, network, privileged
from insula.control.instances.drivers.machine.guest_config import in_guest, mount_of
from insula.control.instances.drivers.machine.sizes import check, size
from insula.control.instances.drivers.machine.stored import StoredDisk, StoredMachine
from insula.machine.installation import Installation
from insula.machine.qemu import root, template
from insula.machine.qemu.command_line import AcceleratorName, GuestDisk, MachineConfig
from insula.machine.shim.plan import command
from insula.model.migration import MachineFacts
from insula.model.objects import (
    IDS_PER_TENANT,
    ContainerOptions,
    ImageConfig,
    Instance,
    InstanceSpec,
    MachineOptions,
    Network,
    Tenant,
    disks_of,
)
from insula.model.views import ExecSpec
from insula.settings import Settings

FIRST: Final = 3
"""The number of the plan, the first descriptor that the shim inherits; the others follow."""
FURTHER: Final = "further "
"""The names of descriptors of further disks begin with it."""
_SAME: Final = ("memory", "modules", "cpus", "plugged", "machine")
"""What a machine that goes on must have as before."""


class MachineStart(NamedTuple):
    """What a machine starts from: the numbers of its descriptors by their names, and the generation that it has to
    answer with; the moment that it goes on from, or what it is that comes from another host. With `hold` it has no
    program, and its agent holds the root."""

    descriptors: dict[str, int]
    generation: str
    accelerator: AcceleratorName = "tcg"
    resumed: StoredMachine | None = None
    arriving: MachineFacts | None = None
    hold: bool = False


class MachineRequests(Requests):
    """Makes requests to the runtime, as `Requests` does for containers."""

    def oci(
        self, tenant: Tenant, instance: Instance, spec: InstanceSpec, directory: ContainerDirectory
    ) -> tuple[list[str], dict[str, Any]]:
        """The OCI config of the program, in the guest: it has the machine's own users and network, and what a container
        would have of the rest."""
        check(instance.spec)
        own = spec.options
        assert isinstance(own, MachineOptions)
        options = ContainerOptions(group_add=own.group_add)
        lower, made = super().oci(tenant, instance, msgspec.structs.replace(spec, options=options), directory)
        made = in_guest(made, str(directory.etc))
        if own.privileged:
            privileged.allow(made)
        further = [mount_of(each) for each in own.disks if each.mount]
        return lower, {**made, "mounts": [*made["mounts"], *further]}

    def process(self, tenant: Tenant, instance: Instance, wanted: ExecSpec) -> dict[str, Any]:
        """The process in the container that stands for one in the guest."""
        process = super().process(tenant, instance, wanted)
        made = jail.process([root.SHIM, "exec", json.dumps(process), secrets.token_hex(8)], terminal=wanted.tty)
        made["oomScoreAdj"] = 1000  # it is killed rather than QEMU where many of them take all memory
        return made | ({"consoleSize": process["consoleSize"]} if "consoleSize" in process else {})

    def disk(self, instance_id: str) -> Path:
        """The file of an instance's disk."""
        return self.directory(instance_id).layer / "disk"

    def further_disks(self, instance_id: str) -> Path:
        """The directory of the files of an instance's further disks."""
        return self.directory(instance_id).layer / "disks"

    def machine(
        self,
        tenant: Tenant,
        instance: Instance,
        program: Launch,
        base: Path,
        accelerator: AcceleratorName = "tcg",
        *,
        copy: bool,
    ) -> Launch:
        """The request for the container, in place of that for the program. `base` is its root file system. A `copy` is
        a machine whose memory is a file that others have too."""
        limits = spec.resources(jail.resources(instance.spec.resources, copy=copy))
        devices = [jail.KVM] if accelerator == "kvm" else []
        return jail.launch(tenant, program, base, limits, devices)

    def plan(
        self, instance: Instance, networks: Sequence[Network], program: dict[str, Any], start: MachineStart
    ) -> int:
        """A descriptor of the plan (`insula.machine.shim`)."""
        of, resumed, arriving = start.descriptors, start.resumed, start.arriving
        ports = instance.plugged
        is_copied = resumed is None and "state" in of
        there = ports[:1] if is_copied else ports
        known = arriving or resumed
        further, added = resumed.further if resumed else [], [] if known else disks_of(instance.spec)
        if arriving:
            further = [StoredDisk(disk=each, slot=arriving.further[each.name]) for each in disks_of(instance.spec)]
        slots = known.slots if known else [*range(1, 1 + max(1, len(there)))]
        taps = [*(of.get(port.interface, -1) for port in there), *([-1] * len(slots))]
        interfaces = [
            device._replace(fd=fd, slot=slot)
            for device, fd, slot in zip(template.INTERFACES, taps, slots, strict=False)
        ]
        indices = [*(port.index for port in there), *([None] * len(slots))]
        machine = MachineConfig(
            kernel=root.KERNEL,
            initramfs=root.INITRAMFS,
            **size(instance.spec)._asdict(),
            agent=-1,
            qmp=-1,
            disks=[GuestDisk("image", of["image"], read_only=True), GuestDisk("disk", of["disk"])],
            further=[GuestDisk(each.disk.name, of[FURTHER + each.disk.name], slot=each.slot) for each in further],
            interfaces=interfaces,
            memory_fd=of.get("memory", -1),
            state=of.get("state", -1),
            accelerator=start.accelerator,
        )
        if known:
            machine = machine._replace(**{name: getattr(known, name) for name in _SAME}, arriving=arriving is not None)
        plan = {
            "resumed": resumed is not None,
            "arriving": arriving is not None,
            **command(machine, root.QEMU),
            "disk": self.disk(instance.id).stat().st_size,
            "further": {each.disk.name: (each.slot, each.disk.mount) for each in further},
            "disks": [{"disk": each.name, "path": each.mount, "file": of[FURTHER + each.name]} for each in added],
            "memory": machine.memory,
            "modules": machine.modules,
            "cpus": machine.cpus,
            "plugged": machine.plugged,
            "network": network.plan(ports, networks),
            "slots": [*zip(slots, indices, strict=False)],
            "inserted": [
                {**network.device(port, of_port), "tap": of[port.interface]}
                for port, of_port in zip(ports, networks, strict=True)
                if port not in there and port.interface in of
            ],
            **for_agent(instance, networks, program, start.generation, grows=disk.grows(self.disk(instance.id))),
        }
        plan["program"]["hold"] = start.hold
        return plan_descriptor(plan)


def for_agent(
    instance: Instance, networks: Sequence[Network], program: dict[str, Any], generation: str, *, grows: bool = False
) -> dict[str, Any]:
    """The part of a plan that says what the agent is to do with the machine, but for its network. The file system of
    its disk `grows` if it is smaller than that."""
    return {
        "remove": instance.spec.remove,
        "identity": {"hostname": program["hostname"], "generation": generation},
        "program": {
            "config": program,
            "machine": instance.id,
            "grows": grows,
            "files": etc_files(instance, networks),
        },
    }


def plan_descriptor(plan: dict[str, Any]) -> int:
    """A descriptor from which the shim reads what to do."""
    fd = os.memfd_create("plan", os.MFD_CLOEXEC)
    os.write(fd, json.dumps(plan).encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def installation(settings: Settings) -> Installation:
    """What machines of this host share. Templates are prepared for programs without options."""
    etc = "/etc"
    image = ImageConfig(entrypoint=["/"])
    usual = spec.config(
        InstanceSpec(image=""), image, user=User(), id_base=IDS_PER_TENANT, hostname="machine", cgroup="", etc=etc
    )
    return Installation(settings.root / "machines", boot_id(), in_guest(usual, etc))
