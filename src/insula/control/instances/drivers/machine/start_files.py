"""`StartFiles`: what a start of a machine needs, and the files that QEMU gets as descriptors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from insula.control.instances.drivers.machine import disk, disk_lock, further_disks
from insula.control.instances.drivers.machine.migration import MachineMigrations
from insula.control.instances.drivers.machine.request import FURTHER, MachineRequests
from insula.control.instances.drivers.machine.sizes import disk_size, is_copy, owner, size
from insula.control.instances.drivers.machine.snapshots import MachineSnapshots
from insula.control.instances.drivers.machine.stored import StoredMachine
from insula.image.store import ImageStore
from insula.kernel.rollback import Rollback
from insula.machine.installation import Installation
from insula.model.objects import Instance, Network, Tenant, disks_of


class StartFiles:
    """Makes and opens the files of machines. All of it blocks. InsulaError, OSError."""

    def __init__(
        self,
        requests: MachineRequests,
        images: ImageStore,
        installation: Installation,
        snapshots: MachineSnapshots,
        migrations: MachineMigrations,
    ) -> None:
        self._requests, self._images, self._installation = requests, images, installation
        self._snapshots, self._migrations = snapshots, migrations

    def prepare(self, tenant: Tenant, instance: Instance) -> Path:
        """Make what is missing of the things that machines share, and return the root of the image."""
        self._installation.root()
        if is_copy(instance.spec) and not instance.arriving:
            self._installation.template(size(instance.spec), owner(tenant)).close()
        return self._images.machine_root(instance.image_digest, instance.root.layers)

    def open(
        self, tenant: Tenant, instance: Instance, image: Path, networks: Sequence[Network], opened: Rollback
    ) -> tuple[dict[str, int], StoredMachine | None]:
        """Open the disks, and the template or the memory of the moment that the machine goes on from. That is returned
        beside the descriptors by name, which `opened` closes."""
        path = self._requests.disk(instance.id)
        before = self._lock_all(instance, opened)
        cold = instance.cold_start == instance.starts
        resumed = self._snapshots.begin(instance, cold=cold)
        arriving = self._migrations.expected(instance)
        if arriving:
            self._migrations.make_disk(instance.id, arriving.disk)
            for each in disks_of(instance.spec):
                further_disks.make_bare(self._requests.further_disks(instance.id), each)
        if not resumed:  # its guest knows a disk of that moment
            disk.ensure(path, disk_size(instance.spec), self._installation.blank)
        found = {
            "image": opened.hold(os.open(image, os.O_RDONLY | os.O_CLOEXEC)),
            "disk": self._lock(path, instance, opened, before),
            **self._further_disks(instance, opened, before),
        }
        if resumed:
            found |= self._moment(instance, opened)
        elif is_copy(instance.spec) and not cold and not arriving:
            found |= self._template(tenant, instance, opened)
        return found, resumed

    def hold(self, tenant: Tenant, instance: Instance, image: Path, opened: Rollback) -> dict[str, int]:
        """Open what a machine has that only holds the files of an instance which does not run: its disk, and the
        template. Conflict if the instance goes on from a moment, whose memory knows the disk as it is."""
        self._snapshots.check_own(instance)
        path = self._requests.disk(instance.id)
        disk.ensure(path, disk_size(instance.spec), self._installation.blank)
        found = {
            "image": opened.hold(os.open(image, os.O_RDONLY | os.O_CLOEXEC)),
            "disk": self._lock(path, instance, opened),
        }
        return found | (self._template(tenant, instance, opened) if is_copy(instance.spec) else {})

    def _template(self, tenant: Tenant, instance: Instance, opened: Rollback) -> dict[str, int]:
        """The template that a machine is a copy of."""
        template = self._installation.template(size(instance.spec), owner(tenant))
        return {"memory": opened.hold(template.memory), "state": opened.hold(template.state)}

    def _further_disks(self, instance: Instance, opened: Rollback, before: Mapping[Path, int]) -> dict[str, int]:
        """Open the further disks of an instance, and remove those that it has no more; `before` is as below."""
        directory, disks = self._requests.further_disks(instance.id), disks_of(instance.spec)
        further_disks.sweep(directory, disks)
        blank = self._installation.blank
        for each in disks:
            further_disks.ensure(directory, each, blank)
        return {FURTHER + each.name: self._lock(directory / each.name, instance, opened, before) for each in disks}

    def _lock_all(self, instance: Instance, opened: Rollback) -> dict[Path, int]:
        """Descriptors of the disks that are there, by their paths, as below: before anything is done to one."""
        directory = self._requests.further_disks(instance.id)
        paths = [self._requests.disk(instance.id), *(directory / each.name for each in disks_of(instance.spec))]
        return {path: self._lock(path, instance, opened) for path in paths if path.exists()}

    def _lock(
        self, path: Path, instance: Instance, opened: Rollback, before: Mapping[Path, int] = MappingProxyType({})
    ) -> int:
        """A descriptor of a file that no other machine may have, which `opened` closes; or the one that was opened so
        `before`, if the file has not been replaced since."""
        if path in before and disk_lock.is_same(before[path], path):
            return before[path]
        return opened.hold(disk_lock.open_locked(path, instance.id, instance.name))

    def _moment(self, instance: Instance, opened: Rollback) -> dict[str, int]:
        """The memory of the moment that the machine goes on from, and the state of its devices."""
        return {
            "memory": opened.hold(self._snapshots.memory(instance.id)),
            "state": opened.hold(self._snapshots.state(instance.id)),
        }
