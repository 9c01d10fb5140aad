"""Runs in domain 0: insulad, with more time for what takes a second on a processor and half a minute on an emulated
one: to have Xen make a guest. python3 -m tests.xen.insulad"""

from __future__ import annotations

from insula.api import daemon
from insula.control import tasks
from insula.control.instances import lifecycle
from insula.machine import registry
from insula.machine.libvirt.keeper import XEN, LibvirtKeeper

PATIENCE = 600.0

if __name__ == "__main__":
    lifecycle.LIMIT = tasks.LIMIT = PATIENCE
    registry.HYPERVISORS["xen"] = lambda name, _: LibvirtKeeper(name, XEN, seconds=PATIENCE)
    daemon.main()
