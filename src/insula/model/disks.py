"""Further disks of virtual machines."""

from __future__ import annotations

from typing import Annotated

import msgspec

from insula.model import fields, rules

DiskName = Annotated[str, fields.schema(pattern=rules.anchored(rules.DISK), maxLength=rules.MAX_DISK_NAME)]


class FurtherDisk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A further disk of a virtual machine, of `size` bytes. The guest has it as /dev/disk/by-id/virtio-NAME; with
    `mount` it has a file system, which is mounted there."""

    name: DiskName
    size: fields.Disk
    mount: fields.TmpfsPath | None = None
