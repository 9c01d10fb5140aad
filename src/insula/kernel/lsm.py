"""Labels of Linux Security Modules: the AppArmor profile or SELinux context of the next program.

With such a module enabled, a process has attributes in /proc/PID/attr (proc_pid_attr(5)); a label written into `exec`
applies from its next execve(2) on. The write must reach the kernel. In a container, /proc could be a plain directory of
the image, or another file could be mounted over the attribute; the program would then run unconfined without an error
(CVE-2019-16884, CVE-2025-52881). So /proc is checked to be procfs, and no link and no mount is crossed below it.
"""

from __future__ import annotations

import os

from insula.kernel import libc, syscalls

_PROC_SUPER_MAGIC = 0x9FA0


def set_apparmor_profile(name: str) -> None:
    """Run the next program under this AppArmor profile, which must be loaded. OSError: EINVAL without AppArmor."""
    try:
        _write("apparmor/exec", f"exec {name}")  # since Linux 5.8 each module has attributes of its own
    except FileNotFoundError:
        _write("exec", f"exec {name}")


def set_selinux_label(label: str) -> None:
    """Run the next program in this SELinux context, and label its keyring. OSError: EINVAL without SELinux."""
    _write("exec", label)
    _write("keycreate", label)


def _write(attribute: str, value: str) -> None:
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if _filesystem(proc) != _PROC_SUPER_MAGIC:
            raise OSError(2, "it is not procfs", "/proc")
        resolve = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_XDEV
        fd = syscalls.openat2(proc, f"{os.getpid()}/attr/{attribute}", os.O_WRONLY, resolve=resolve)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)
    finally:
        os.close(proc)


def _filesystem(fd: int) -> int:
    """Return the type of the file system behind a descriptor: f_type of fstatfs(2)."""
    answer = libc.buffer(256)
    libc.check(libc.function("fstatfs")(fd, answer), "fstatfs")
    return int.from_bytes(answer.raw[:4], "little")
