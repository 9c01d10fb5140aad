"""The first steps of process 1: the kernel's own file systems, modules, and the channel to the host.

The kernel starts /init with an empty tmpfs as root, besides what the initramfs holds. /proc, /sys and /dev are made by
mounting them. Modules are in /modules, numbered in the order in which they can be loaded (finit_module(2)).
"""

from __future__ import annotations

import gc
import os
import time

from insula.agent.channel import Channel
from insula.kernel import libc, syscalls
from insula.kernel.terminal import make_raw
from insula.machine.console import ConsoleCoding
from insula.machine.protocol import PORT

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT = 8 << 20
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
_ROOM = 1 << 20
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


def settle_memory() -> None:
    """Leave the memory as it is from now on, since what a copy of this machine writes to is no longer shared. What was
    made so far is never looked at by the collector of garbage (gc.freeze). What is freed is kept (mallopt(3)), which
    also saves system calls."""
    mallopt = libc.function("mallopt")
    mallopt(_M_MMAP_THRESHOLD, _KEPT)
    mallopt(_M_TRIM_THRESHOLD, _KEPT)
    libc.buffer(_ROOM)  # and is freed: the heap need not grow at once
    gc.collect()
    gc.freeze()
    populate()


def populate() -> None:
    """Have each page of this process be mapped, and be its own if it may write to it (MADV_POPULATE_WRITE, madvise(2)):
    a copy of this machine has no page faults there."""
    madvise = libc.function("madvise")
    with open("/proc/self/maps") as file:
        areas = [line.split() for line in file if "[v" not in line]  # those of the kernel, as vdso(7)
    for addresses, rights, *_ in areas:
        begin, end = (int(each, 16) for each in addresses.split("-"))
        if rights.startswith("r"):
            advice = _MADV_POPULATE_WRITE if rights[1] == "w" else _MADV_POPULATE_READ
            madvise(libc.Long(begin), libc.Long(end - begin), advice)


def open_channel() -> Channel:
    """Open the channel to the host: the console of a guest of Xen, else the port. OSError."""
    if not is_guest_of_xen():
        return Channel(open_port())
    return open_console("/dev/hvc0")


def is_guest_of_xen() -> bool:
    try:
        with open("/sys/hypervisor/type") as file:
            return file.read().strip() == "xen"
    except FileNotFoundError:
        return False


def open_console(path: str) -> Channel:
    """Open a console as a channel. OSError."""
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    make_raw(fd)
    return Channel(fd, ConsoleCoding())


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
