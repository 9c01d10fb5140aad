"""Disk images of virtual machines, as part of images and of instances."""

from __future__ import annotations

from typing import Literal

import msgspec

Firmware = Literal["bios", "uefi"]
"""What starts a virtual machine of a disk image."""
DevicesKind = Literal["full", "para"]
"""Devices of a virtual machine: those of a PC, which any system has drivers for (full virtualization), or virtio's
(para-virtualization)."""
Media = Literal["disk", "cdrom"]


class InsertedCd(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A CD in a drive of a machine: the digests of its image's manifest and of its content."""

    image: str
    digest: str


class DiskRoot(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="disk"):
    """A disk image of a virtual machine, of which each instance has a copy: its digest and its size in bytes, the
    firmware that starts it, and the devices that instances have if they don't ask for others. An instance of a CD has
    an empty disk, and the CD in its drive. `inserted` are CDs of an instance that it does not boot from. With `ejected`
    these were taken out of all drives; `replacement` was put into the last one later."""

    digest: str
    size: int
    firmware: Firmware = "bios"
    devices: DevicesKind = "para"
    media: Media = "disk"
    inserted: list[InsertedCd] = []
    ejected: bool = False
    replacement: InsertedCd | None = None

    @property
    def drives(self) -> int:
        """How many drives for CDs an instance has."""
        return (self.media == "cdrom") + len(self.inserted)

    @property
    def cds(self) -> list[InsertedCd | None]:
        """What is in each drive; None if it is empty. The image of the instance itself has no name there."""
        own = [InsertedCd(image="", digest=self.digest)] if self.media == "cdrom" else []
        found: list[InsertedCd | None] = [None] * self.drives if self.ejected else [*own, *self.inserted]
        return [*found[:-1], self.replacement] if self.replacement else found

    @property
    def layers(self) -> list[str]:
        """None: a disk is not made of layers."""
        return []
