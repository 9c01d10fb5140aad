"""`DiskImageFiles`: the disk of a machine of a disk image, which is a copy of the image's, and what else QEMU gets.

A copy keeps the blocks that it does not write in common with the image where the file system of the host can do that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from ipaddress import ip_network
from pathlib import Path

from insula.control.instances.drivers.machine import stored
from insula.control.instances.drivers.machine.disk_image_request import SEED, cd_name, disk_of, disk_size
from insula.control.instances.drivers.machine.start_files import StartFiles
from insula.control.instances.drivers.machine.stored import StoredMachine
from insula.kernel import copies
from insula.kernel.rollback import Rollback
from insula.machine.disk import cloud_init, firmware
from insula.machine.disk.cloud_init import SeedInterface
from insula.model.disk_images import DiskRoot, InsertedCd
from insula.model.errors import Unavailable
from insula.model.objects import Instance, MachineOptions, Network, Tenant


class DiskImageFiles(StartFiles):
    """Makes and opens the files of machines, as `StartFiles` does for those of container images."""

    def prepare(self, tenant: Tenant, instance: Instance) -> Path:
        """Make what is missing of the things that machines share, and return the disk of the image."""
        self._installation.root()
        found = disk_of(instance)
        if found.firmware == "uefi":
            _firmware()
        return self._images.disk(found.digest)

    def make_disk(self, tenant: Tenant, instance: Instance) -> None:
        """Make the disk of an instance, unless it is there. A copy may take minutes, so this is done before a start."""
        self._requests.directory(instance.id).make(tenant.id_base)
        _make_disk(disk_of(instance), self.prepare(tenant, instance), self._requests.disk(instance.id))

    def open(
        self, tenant: Tenant, instance: Instance, image: Path, networks: Sequence[Network], opened: Rollback
    ) -> tuple[dict[str, int], StoredMachine | None]:
        """Open CDs, UEFI firmware, the disk, the seed, and the memory of the moment that the machine goes on from. That
        is returned beside the descriptors by name, which `opened` closes."""
        disk, of = self._requests.disk(instance.id), disk_of(instance)
        before = self._lock_all(instance, opened)
        resumed = self._snapshots.begin(instance, cold=instance.cold_start == instance.starts)
        given = {name: opened.hold(fd) for name, fd in self.open_cds(of)}
        _make_disk(of, image, disk)  # it is there, unless somebody has removed it
        _enlarge(disk, disk_size(instance.spec, of))
        _write_seed(disk.with_name(SEED), instance, networks)
        given[stored.DISK] = self._lock(disk, instance, opened, before)
        written = [SEED]
        if of.firmware == "uefi":
            uefi = _firmware()
            _copy(uefi.variables, disk.with_name(stored.VARIABLES))
            given["code"] = opened.hold(os.open(uefi.code, os.O_RDONLY | os.O_CLOEXEC))
            written.append(stored.VARIABLES)
        for name in written:
            given[name] = self._lock(disk.with_name(name), instance, opened)
        given |= self._further_disks(instance, opened, before)
        if resumed:
            given |= self._moment(instance, opened)
        return given, resumed

    def open_cds(self, of: DiskRoot) -> Iterator[tuple[str, int]]:
        """Open the CDs in the drives: their names and descriptors, which the caller closes. OSError."""
        for drive, cd in enumerate(of.cds):
            if cd:
                yield cd_name(drive), self.open_cd(cd)

    def open_cd(self, cd: InsertedCd) -> int:
        """A descriptor of a CD, which the caller closes. OSError."""
        return os.open(self._images.disk(cd.digest), os.O_RDONLY | os.O_CLOEXEC)


def _write_seed(path: Path, instance: Instance, networks: Sequence[Network]) -> None:
    """Write what cloud-init reads. OSError."""
    options = instance.spec.options
    assert isinstance(options, MachineOptions)
    hostname, interfaces = instance.spec.hostname or instance.name, _seed_interfaces(instance, networks)
    files = cloud_init.files(instance.id, hostname, interfaces, options.ssh_keys, options.user_data)
    cloud_init.write(path, files)


def _seed_interfaces(instance: Instance, networks: Sequence[Network]) -> list[SeedInterface]:
    """What cloud-init is told of the networks of an instance."""
    found = []
    for port, network in zip(instance.plugged, networks, strict=True):
        address6 = None
        if port.address6 and network.subnet6:
            address6 = f"{port.address6}/{ip_network(network.subnet6).prefixlen}"
        found.append(SeedInterface(port.mac, network.mtu, address6, network.gateway6))
    return found


def _firmware() -> firmware.UefiFirmware:
    found = firmware.find()
    if found is None:
        raise Unavailable("UEFI firmware for virtual machines is not on this host", "apt install ovmf")
    return found


def _copy(source: Path, target: Path) -> None:
    """Copy a file, complete or not at all, unless that was done before. OSError."""
    if not target.exists():
        draft = target.with_name(f"{target.name}.new")
        with source.open("rb") as file, draft.open("wb") as made:
            os.fchmod(made.fileno(), 0o600)
            copies.copy(file.fileno(), made.fileno())
        draft.rename(target)


def _make_disk(disk: DiskRoot, image: Path, target: Path) -> None:
    """Make the disk of an instance, unless it is there: a copy of the image's, or an empty one beside a CD. OSError."""
    if disk.media == "cdrom":
        _make_empty(target)
    else:
        _copy(image, target)


def _make_empty(target: Path) -> None:
    """Make an empty file, unless it is there. OSError."""
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _enlarge(disk: Path, least: int) -> None:
    """Make a disk at least so large, with zeros at its end. OSError."""
    if disk.stat().st_size < least:
        os.truncate(disk, least)
