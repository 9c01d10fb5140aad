"""The registry of hypervisors, by the first part of their names in the settings. A new one is a new entry.

Each is imported when it is asked for: a host has one of them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Final

from insula.machine.hypervisor import Hypervisor
from insula.model.errors import Unavailable

_LONGEST = 1024


def _qemu(name: str, password_file: str) -> Hypervisor:
    from insula.machine.qemu.hypervisor import QemuHypervisor

    return QemuHypervisor()


def _xen(name: str, password_file: str) -> Hypervisor:
    from insula.machine.libvirt.keeper import XEN, LibvirtKeeper

    return LibvirtKeeper(name, XEN)


def _esx(name: str, password_file: str) -> Hypervisor:
    from insula.machine.libvirt.keeper import ESX, LibvirtKeeper

    return LibvirtKeeper(name, ESX, lambda: read_password(password_file))


HYPERVISORS: Final[dict[str, Callable[[str, str], Hypervisor]]] = {"qemu": _qemu, "xen": _xen, "esx": _esx}


def open_hypervisor(name: str, password_file: str = "") -> Hypervisor:
    """The hypervisor with that name: "qemu", "xen:///system", "esx://root@HOST/". It is not connected to before its
    first method is called."""
    return HYPERVISORS[name.partition(":")[0]](name, password_file)


def read_password(path: str) -> str:
    """The password in a file, which nobody but root may read. Unavailable."""
    hint = "write it into a file of mode 600, and name that in machines.password_file"
    if not path:
        raise Unavailable("the hypervisor wants a password, and machines.password_file names no file", hint)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise Unavailable(f"{path} can't be read: {error.strerror}", hint) from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o077:
            raise Unavailable(f"{path} is not a file that root alone may read", hint)
        return os.read(fd, _LONGEST).decode(errors="replace").rstrip("\n")
    finally:
        os.close(fd)
