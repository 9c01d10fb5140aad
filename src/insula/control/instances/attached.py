"""`attached`: what an instance has beside its ports that may come and go while it runs."""

from __future__ import annotations

from typing import Final

from insula.model.disk_images import DiskRoot
from insula.model.objects import Instance, disks_of

CD: Final = "cdrom:"
"""What the names of CDs begin with, and of no disk."""


def attached(instance: Instance) -> list[str]:
    """What is attached to an instance while it runs, and may come and go: further disks by their names, and CDs."""
    root = instance.root
    cds = root.cds if isinstance(root, DiskRoot) else ()
    return [
        *(each.name for each in disks_of(instance.spec)),
        *(f"{CD}{number}:{each.digest}" for number, each in enumerate(cds) if each),
    ]
