"""`DiskImageSnapshots`: snapshots of machines of disk images, as of others, and copies of their disks.

A system that goes on in a copy would have the MAC addresses, the host name and the SSH host keys of its original, and
nobody in it could be told. So a copy has the disk of one moment and no memory: it is booted, and cloud-init sees
another instance ID.
"""

from __future__ import annotations

from insula.control.instances.drivers.machine import stored
from insula.control.instances.drivers.machine.snapshots import MachineSnapshots
from insula.control.workers import in_thread
from insula.model.objects import Instance, Tenant


class DiskImageSnapshots(MachineSnapshots):
    """The files of snapshots; see `MachineSnapshots`."""

    copies_have_memory = False

    async def place(self, instance: Instance, copies: str, tenant: Tenant, child_id: str) -> None:
        source = self._place(instance.id, "copies", copies)

        def place() -> None:
            record = stored.read(source)
            self._requests.directory(child_id).make(tenant.id_base)
            for name, path in self._places(child_id, [each.disk for each in record.further]).items():
                if name in record.files:
                    path.parent.mkdir(mode=0o700, exist_ok=True)
                    stored.copy(source / name, path)

        await in_thread(None, place)
