"""What guests of a hypervisor of type 1 share on this host, which is its domain 0: beside those of `Installation`

    BOOT/KEY/rootfs/          the root file system of a machine's container: the shim, without QEMU
    BOOT/KEY/vmlinux          the guests' kernel
    BOOT/KEY/initramfs
    BOOT/KEY/vif              the script for the network devices of guests

The hypervisor's tools are given these files by path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from insula.machine.guest import initramfs
from insula.machine.installation import PROGRAMS, Installation
from insula.machine.qemu import root

PROGRAMS_OF_XEN: Final = {name: package for name, package in PROGRAMS.items() if name != root.QEMU} | {
    "/usr/bin/xenstore-write": "xenstore-utils"
}
_VIF: Final = """\
#!/bin/sh
# Xen's tools call this when a network device of a guest has appeared, or goes. insulad connects it; the tools only wait
# to be told that somebody has.
[ "$1" != online ] || exec /usr/bin/xenstore-write "$XENBUS_PATH/hotplug-status" connected
"""


class GuestFiles(NamedTuple):
    """Paths of what guests boot, and of the script for their network devices."""

    kernel: Path
    initramfs: Path
    vif: Path


class KeptInstallation(Installation):
    """The part of a host, below `directory`, for guests that a hypervisor keeps."""

    programs = PROGRAMS_OF_XEN

    def files(self) -> GuestFiles:
        """Return what guests boot. Unavailable, Failed."""
        base = self.root().parent
        return GuestFiles(base / "vmlinux", base / "initramfs", base / "vif")

    def _build(self, draft: Path, kernel: Path) -> None:
        root.build_shim(draft / "rootfs")
        (draft / "vmlinux").write_bytes((kernel / "vmlinux").read_bytes())
        made = initramfs.build(kernel / "modules", drivers=initramfs.DRIVERS_OF_XEN)
        (draft / "initramfs").write_bytes(made)
        (draft / "vif").write_text(_VIF)
        (draft / "vif").chmod(0o755)
