"""`with_cd`: a virtual machine with another CD in its drives, or none, which its host changes while it runs (attached
disks)."""

from __future__ import annotations

import msgspec

from insula.control.instances.checks import Known
from insula.control.instances.specs import cli_command
from insula.model.disk_images import DiskRoot, InsertedCd
from insula.model.errors import Conflict, Invalid
from insula.model.objects import Image, Instance, InstanceSpec, MachineOptions


def with_cd(
    known: Known, instance: Instance, spec: InstanceSpec, name: str | None, image: Image | None
) -> tuple[Instance, InstanceSpec]:
    """The instance and its spec with the CD of an image in its last drive, in place of what is there; without an image
    all drives are empty. One without a drive gets one, but not while it runs. Conflict, Invalid."""
    root, options, cd = instance.root, spec.options, image and inserted(image)
    if not isinstance(root, DiskRoot) or not isinstance(options, MachineOptions) or not (root.drives or cd):
        raise Conflict(f"{instance.name} has no drive for CDs", "`insula run --vm --cdrom` gives one to a disk image")
    if known.active and not root.drives:
        stop = cli_command(instance.tenant, f"stop {instance.name}")
        raise Conflict(f"{instance.name} was started without a drive for CDs", f"first {stop}: its next start has one")
    if known.active and known.status.state != "running":
        raise Conflict(f"{instance.name} is {known.status.state}, and does not answer", "try again when it runs")
    if cd is None:
        root = msgspec.structs.replace(root, ejected=True, replacement=None)
    elif root.drives:
        root = msgspec.structs.replace(root, replacement=cd)
    else:
        root = msgspec.structs.replace(root, inserted=[cd])
    options = msgspec.structs.replace(options, cdrom=name)
    return msgspec.structs.replace(instance, root=root), msgspec.structs.replace(spec, options=options)


def inserted(image: Image) -> InsertedCd:
    """The CD that an image is. Invalid if it is none."""
    if image.disk is None or image.disk.media != "cdrom":
        hint = "`insula image import --vm --format iso` makes one of an ISO image"
        raise Invalid(f"image {image.name} is no CD", hint)
    return InsertedCd(image=image.digest, digest=image.disk.digest)
