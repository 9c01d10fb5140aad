"""The size of a machine by its spec, the sizes that one may have, and whether it is a copy of a template."""

from __future__ import annotations

import math
import os
from typing import Final

from insula.control.instances.drivers.machine import disk
from insula.machine.installation import GuestSize
from insula.machine.qemu.devices import MOST_NETWORKS
from insula.model.errors import Invalid
from insula.model.objects import InstanceSpec, MachineOptions, Tenant
from insula.model.units import format_size

LEAST: Final = 128 << 20
"""Bytes of memory below which a guest does not boot."""
MOST: Final = 8 << 30
MOST_CPUS: Final = 64
_CPUS_OF_COPIES: Final = 8
PRIVATE: Final = {"templates": "private"}
"""A label of tenants. Whoever shares pages with others may find out, by the time that it takes to write to them, which
ones of them were not written to (CVE-2015-2877): nothing but the kernel's and the agent's, but it is something."""
_MIB: Final = 1 << 20


def size(spec: InstanceSpec) -> GuestSize:
    """The size of the guest: it has as many processors as its limit lets it use, and no more than the host."""
    cpus = math.ceil(spec.resources.cpus or 1)
    return GuestSize((spec.resources.memory or LEAST) // _MIB, min(cpus, os.cpu_count() or 1, MOST_CPUS))


def is_copy(spec: InstanceSpec) -> bool:
    """Whether the machine starts as a copy of a template. There are templates for powers of two only, and for 8
    processors at most, since each takes memory and disk of the host, which no tenant has to pay for."""
    asked, options = size(spec), spec.options
    powers = all(number & (number - 1) == 0 for number in asked) and asked.cpus <= _CPUS_OF_COPIES
    return powers and isinstance(options, MachineOptions) and not options.cold


def owner(tenant: Tenant) -> int | None:
    """The index of the tenant, if its machines are copies of templates that no other tenant has: the operator has given
    it the label `PRIVATE`. None for the templates of all."""
    return tenant.index if PRIVATE.items() <= tenant.labels.items() else None


def disk_size(spec: InstanceSpec) -> int:
    """The size of the disk in bytes, which is a whole number of MiB."""
    return (spec.resources.disk or disk.SIZE) // _MIB * _MIB


def check(spec: InstanceSpec) -> None:
    """Raise Invalid for what a machine of a container image can't have."""
    check_size(spec)
    if disk_size(spec) < disk.LEAST:
        raise Invalid("the disk of a virtual machine is too small", f"use at least {format_size(disk.LEAST)}")
    options = spec.options
    if isinstance(options, MachineOptions) and (
        options.devices or options.user_data or options.ssh_keys or options.cdrom
    ):
        what = "--devices, --user-data, --ssh-key and --cdrom are of disk images, and this is a container image"
        raise Invalid(what, "leave it out; `insula image import --vm` makes images of disks")


def check_size(spec: InstanceSpec) -> None:
    """Raise Invalid for a size that no machine can have."""
    asked = spec.resources.memory or LEAST
    if not LEAST <= asked <= MOST:
        what = f"a virtual machine can't have {format_size(asked)} of memory"
        raise Invalid(what, f"use {format_size(LEAST)} to {format_size(MOST)}")
    if len(spec.networks) > MOST_NETWORKS:
        what = f"a virtual machine is on {MOST_NETWORKS} networks at most"
        raise Invalid(what, "leave out some, or use a container")
