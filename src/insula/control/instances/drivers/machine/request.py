"""`MachineRequests`: the program of a machine, its container, and the plan with which the shim brings them together."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from insula.container.service.client import Launch
from insula.control.instances.drivers.container import spec
from insula.control.instances.drivers.container.directory import ContainerDirectory
from insula.control.instances.drivers.container.etc_files import etc_files
from insula.control.instances.drivers.container.request import Requests
from insula.control.instances.drivers.machine import disk, jail, network
from insula.machine.protocol import ETC
from insula.machine.qemu import root, template
from insula.model.errors import Invalid
from insula.model.objects import ContainerOptions, Instance, InstanceSpec, MachineOptions, Network, Tenant
from insula.model.units import format_size
from insula.model.views import ExecSpec

LEAST: Final = 128 << 20
"""Bytes of memory below which a guest does not boot."""
MOST: Final = 8 << 30
_MIB: Final = 1 << 20
_KEPT: Final = ("pid", "mount", "ipc", "uts", "cgroup")
_OF_HOSTS: Final = ("uidMappings", "gidMappings", "seccomp", "resources", "cgroupsPath")


class MachineRequests(Requests):
    """Makes requests to the runtime, as `Requests` does for containers."""

    def oci(
        self, tenant: Tenant, instance: Instance, spec: InstanceSpec, directory: ContainerDirectory
    ) -> tuple[list[str], dict[str, Any]]:
        """The OCI config of the program, in the guest: it has the machine's own users and network, and what a container
        would have of the rest."""
        check(instance.spec)
        options = spec.options
        if isinstance(options, MachineOptions):
            options = ContainerOptions(group_add=options.group_add)
        lower, made = super().oci(tenant, instance, msgspec.structs.replace(spec, options=options), directory)
        linux = {name: value for name, value in made["linux"].items() if name not in _OF_HOSTS}
        linux |= {"namespaces": [{"type": kind} for kind in _KEPT], "sysctl": {}}
        mounts = [_in_guest(mount, str(directory.etc)) for mount in made["mounts"]]
        return lower, {**made, "linux": linux, "mounts": mounts}

    def process(self, tenant: Tenant, instance: Instance, wanted: ExecSpec) -> dict[str, Any]:
        """The process in the container that stands for one in the guest."""
        process = super().process(tenant, instance, wanted)
        made = jail.process([root.SHIM, "exec", json.dumps(process)], terminal=wanted.tty)
        return made | ({"consoleSize": process["consoleSize"]} if "consoleSize" in process else {})

    def disk(self, instance_id: str) -> Path:
        """The file of an instance's disk."""
        return self.directory(instance_id).layer / "disk"

    def machine(self, tenant: Tenant, instance: Instance, program: Launch, base: Path) -> Launch:
        """The request for the container, in place of that for the program. `base` is its root file system."""
        limits = spec.resources(jail.resources(instance.spec.resources))
        config = jail.config(tenant.id_base, program.cgroup, limits, terminal=program.tty)
        return program._replace(config=config, lower=[str(base)], volatile=True)

    def plan(
        self, instance: Instance, networks: Sequence[Network], program: dict[str, Any], descriptors: dict[str, int]
    ) -> int:
        """A descriptor of the plan (`insula.machine.shim`). `descriptors` has the numbers of the others."""
        of = descriptors
        ports = instance.plugged
        interfaces = [
            [each.mac, of.get("tap", -1) if ports and number == 0 else -1, each.mtu]
            for number, each in enumerate(template.INTERFACES)
        ]
        machine: dict[str, Any] = {
            "kernel": root.KERNEL,
            "initramfs": root.INITRAMFS,
            "memory": memory(instance.spec),
            "disks": [["image", of["image"], True], ["disk", of["disk"]]],
            "interfaces": interfaces,
        }
        if "memory" in of:
            machine |= {"memory_fd": of["memory"], "state": of["state"]}
        plan = {
            "machine": machine,
            "qemu": root.QEMU,
            "disk": self.disk(instance.id).stat().st_size,
            "identity": {"hostname": program["hostname"]},
            "network": network.plan(ports, networks),
            "program": {
                "config": program,
                "read_only": instance.spec.read_only,
                "files": etc_files(instance, networks),
            },
        }
        fd = os.memfd_create("plan", os.MFD_CLOEXEC)
        os.write(fd, json.dumps(plan).encode())
        os.lseek(fd, 0, os.SEEK_SET)
        return fd


def memory(spec: InstanceSpec) -> int:
    """The guest's memory in MiB."""
    return (spec.resources.memory or LEAST) // _MIB


def is_copy(spec: InstanceSpec) -> bool:
    """Whether the machine starts as a copy of a template. There are templates for powers of two only, since each takes
    memory and disk of the host, which no tenant has to pay for."""
    asked, options = memory(spec), spec.options
    return asked & (asked - 1) == 0 and isinstance(options, MachineOptions) and not options.cold


def disk_size(spec: InstanceSpec) -> int:
    """The size of the disk in bytes, which is a whole number of MiB."""
    return (spec.resources.disk or disk.SIZE) // _MIB * _MIB


def check(spec: InstanceSpec) -> None:
    """Raise Invalid for what a machine can't have."""
    asked = spec.resources.memory or LEAST
    if not LEAST <= asked <= MOST:
        what = f"a virtual machine can't have {format_size(asked)} of memory"
        raise Invalid(what, f"use {format_size(LEAST)} to {format_size(MOST)}")
    if disk_size(spec) < disk.LEAST:
        raise Invalid("the disk of a virtual machine is too small", f"use at least {format_size(disk.LEAST)}")
    if len(spec.networks) > len(template.INTERFACES):
        raise Invalid("a virtual machine is on one network at most", "leave out the others, or use a container")


def _in_guest(mount: dict[str, Any], etc: str) -> dict[str, Any]:
    """A mount whose source is a file that the agent writes, if it is one of the host's."""
    source = str(mount.get("source", ""))
    return {**mount, "source": f"{ETC}/{os.path.basename(source)}"} if os.path.dirname(source) == etc else mount
