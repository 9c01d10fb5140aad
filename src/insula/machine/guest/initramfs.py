"""The initramfs of a machine: the agent, the Python that runs it, and drivers.

/init                   the agent: #!/usr/bin/python3.11
/usr/bin/python3.11     the host's, with the libraries that it needs
/usr/lib/python311.zip  its modules, and the agent's
/modules/00-….ko        drivers, in the order in which they are loaded
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import insula
from insula.machine.guest import python
from insula.machine.guest.cpio import CpioArchive
from insula.machine.guest.modules import Modules

DRIVERS = ("virtio_pci", "virtio_console", "virtio_blk", "virtio_net", "virtio_rng", "erofs", "ext4", "overlay")
DRIVERS_OF_XEN = ("xen_blkfront", "xen_netfront", "erofs", "ext4", "overlay")
_MODULES = (
    *("insula.agent.main", "insula.kernel.cgroups.v2", "traceback"),
    *("insula.container.archive", "bz2", "gzip", "lzma", "resource"),
)
"""The agent, and what it imports only when it needs it."""
INIT = """\
#!{interpreter} -ISB
from insula.agent import early
early.leave_first_root()
early.mount_kernel_file_systems()
from insula.agent.main import main
main()
"""


def build(modules: Path, init: str = INIT, drivers: Sequence[str] = DRIVERS) -> bytes:
    """Build the archive. `modules` is the /lib/modules/RELEASE of the guest's kernel. OSError, LookupError."""
    archive = CpioArchive()
    archive.device("/dev/console", 5, 1)
    archive.device("/dev/null", 1, 3, mode=0o666)
    archive.device("/dev/urandom", 1, 9, mode=0o666)  # Python's, where the kernel has too little entropy at first
    for directory in ("/proc", "/sys", "/tmp", "/run"):
        archive.directory(directory)
    needed = python.closure(_MODULES, Path(insula.__file__).parents[1])
    for path, data in needed.files.items():
        archive.file(path, data, 0o755)
    for path, target in needed.links.items():
        archive.symlink(path, target)
    for number, (name, data) in enumerate(Modules(modules).in_order(drivers)):
        archive.file(f"/modules/{number:02}-{name}.ko", data)
    archive.file("/init", init.format(interpreter=needed.interpreter).encode(), 0o755)
    return archive.finish()
