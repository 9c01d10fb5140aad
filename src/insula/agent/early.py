"""The first steps of process 1: the kernel's own file systems, modules, and the port to the host.

The kernel starts /init with an empty tmpfs as root, besides what the initramfs holds. /proc, /sys and /dev are made by
mounting them. Modules are in /modules, numbered in the order in which they can be loaded (finit_module(2)).
"""

from __future__ import annotations

import os
import time

from insula.kernel import syscalls
from insula.machine.protocol import PORT

_PORTS = "/sys/class/virtio-ports"
_MOUNTS = (
    ("proc", "/proc", syscalls.MS_NOSUID | syscalls.MS_NOEXEC | syscalls.MS_NODEV),
    ("sysfs", "/sys", syscalls.MS_NOSUID | syscalls.MS_NOEXEC | syscalls.MS_NODEV),
    ("devtmpfs", "/dev", syscalls.MS_NOSUID | syscalls.MS_NOEXEC),
)


def leave_first_root() -> None:
    """Make the root a mount that pivot_root(2) can leave, which it can't the kernel's first one: a bind mount of it."""
    os.makedirs("/root", exist_ok=True)
    syscalls.mount("/", "/root", None, syscalls.MS_BIND)
    os.chdir("/root")
    syscalls.mount(".", "/", None, syscalls.MS_MOVE)
    os.chroot(".")


def mount_kernel_file_systems() -> None:
    """Mount /proc, /sys, /dev, its terminals, and control groups."""
    for kind, path, flags in _MOUNTS:
        os.makedirs(path, exist_ok=True)
        syscalls.mount(kind, path, kind, flags)
    for kind, path in (("devpts", "/dev/pts"), ("tmpfs", "/dev/shm"), ("cgroup2", "/sys/fs/cgroup")):
        os.makedirs(path, exist_ok=True)
        syscalls.mount(kind, path, kind, syscalls.MS_NOSUID | syscalls.MS_NOEXEC)


def load_modules(directory: str = "/modules") -> None:
    """Load every module, in the order of their names, and remove the files: they take memory."""
    for name in sorted(os.listdir(directory)):
        path = f"{directory}/{name}"
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            syscalls.finit_module(fd)
        finally:
            os.close(fd)
        os.unlink(path)


def open_port(wait: float = 10.0) -> int:
    """Open the port to the host, without blocking. FileNotFoundError if it does not appear within `wait` seconds."""
    end = time.monotonic() + wait
    while True:
        for name in os.listdir(_PORTS) if os.path.isdir(_PORTS) else ():
            with open(f"{_PORTS}/{name}/name") as file:
                if file.read().strip() == PORT:
                    return os.open(f"/dev/{name}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        if time.monotonic() > end:
            raise FileNotFoundError(f"there is no port {PORT}")
        time.sleep(0.005)
