"""`ejected`: a virtual machine without CDs in its drives, which its host takes out while it runs (attached disks)."""

from __future__ import annotations

import msgspec

from insula.control.instances.checks import Known
from insula.model.disk_images import DiskRoot
from insula.model.errors import Conflict
from insula.model.objects import Instance, InstanceSpec, MachineOptions


def ejected(known: Known, instance: Instance, spec: InstanceSpec) -> tuple[Instance, InstanceSpec]:
    """The instance and its spec with empty drives. Conflict if it has none, or does not answer."""
    root, options = instance.root, spec.options
    if not isinstance(root, DiskRoot) or not root.drives or not isinstance(options, MachineOptions):
        raise Conflict(f"{instance.name} has no drive for CDs", "`insula run --vm --cdrom` gives one to a disk image")
    if known.active and known.status.state != "running":
        raise Conflict(f"{instance.name} is {known.status.state}, and does not answer", "try again when it runs")
    empty = msgspec.structs.replace(instance, root=msgspec.structs.replace(root, ejected=True))
    return empty, msgspec.structs.replace(spec, options=msgspec.structs.replace(options, cdrom=None))
