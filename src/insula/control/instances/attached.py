"""`attached`: what an instance has beside its ports that may come and go while it runs."""

from __future__ import annotations

from insula.model.disk_images import DiskRoot
from insula.model.objects import Instance, disks_of


def attached(instance: Instance) -> list[str]:
    """What is attached to an instance while it runs, and may come and go: further disks by their names, and CDs."""
    root = instance.root
    cds = root.drives if isinstance(root, DiskRoot) and not root.ejected else 0
    return [*(each.name for each in disks_of(instance.spec)), *(f"cdrom:{number}" for number in range(cds))]
