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
    all drives are empty."""

    digest: str
    size: int
    firmware: Firmware = "bios"
    devices: DevicesKind = "para"
    media: Media = "disk"
    inserted: list[InsertedCd] = []
    ejected: bool = False

    @property
    def drives(self) -> int:
        """How many drives for CDs an instance has."""
        return (self.media == "cdrom") + len(self.inserted)

    @property
    def layers(self) -> list[str]:
        """None: a disk is not made of layers."""
        return []
