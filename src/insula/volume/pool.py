"""`Pool`: a file system in one file, for trees whose limits the file system of the host can't enforce.

The file is made once, with the given size, and formatted as ext4 or xfs with project quotas. It is mounted by a loop
device that writes to it directly (O_DIRECT), without set-uid programs and device nodes (nosuid, nodev). Its blocks are
allocated when it is made, so that it can't run out of the host's disk later, and is as fast as that. The mount outlives
the process that made it. A larger size makes the file system grow; it is never made smaller.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

from insula.kernel import loop, syscalls
from insula.model.errors import Failed, Unavailable
from insula.model.units import format_size

_MAKE: Final = {
    # no blocks are reserved for root, and a discard would free what was allocated
    "ext4": ("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "project,quota", "-E", "quotatype=prjquota,nodiscard"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-K"),
}
_MAGIC: Final = {"xfs": (0, b"XFSB"), "ext4": (1080, b"\x53\xef")}
_TIMEOUT: Final = 600.0  # seconds for a tool
_ENVIRONMENT: Final = {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin", "LC_ALL": "C.UTF-8"}


class Pool(NamedTuple):
    """The pool in `file`, mounted at `mount_point`."""

    file: Path
    mount_point: Path

    def exists(self) -> bool:
        return self.file.exists()

    def open(self, size: int | None, kind: str) -> None:
        """Make the pool if it is missing, mount it if it is not mounted, and let it grow to `size` bytes. Blocks.

        `kind` is the format of a new one. `size` None leaves it as it is. Failed, Unavailable.
        """
        try:
            if size is not None and not self.exists():
                self._create(size, kind)
            if not self.is_mounted():
                self._mount()
            if size is not None and size > self.file.stat().st_size:
                self._grow(size)
        except OSError as error:
            what = f"the pool {self.file} can't be used: {error.strerror or error}"
            raise Failed(what, "see [storage] in insulad.toml(5)") from error

    def is_mounted(self) -> bool:
        return os.path.ismount(self.mount_point)

    def unmount(self) -> None:
        """Unmount the pool, at the latest when its last file is closed. OSError."""
        if self.is_mounted():
            syscalls.umount2(self.mount_point, syscalls.MNT_DETACH)

    def _create(self, size: int, kind: str) -> None:
        found = os.statvfs(self.file.parent)
        if size > found.f_bavail * found.f_frsize:
            free = format_size(found.f_bavail * found.f_frsize)
            raise Failed(f"a pool of {format_size(size)} does not fit: {free} are free", "ask for less")
        new = self.file.with_name(f"{self.file.name}.new")  # a part of one is never taken for a pool
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _allocate(fd, 0, size)
            _tool(*_MAKE[kind], str(new))
            os.fsync(fd)
            new.rename(self.file)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)

    def _mount(self) -> None:
        self.mount_point.mkdir(mode=0o700, exist_ok=True)
        file = os.open(self.file, os.O_RDWR | os.O_CLOEXEC)
        try:
            kind = _kind(file)
            path, device = loop.attach(file)
            try:
                flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOATIME
                syscalls.mount(path, self.mount_point, kind, flags, "prjquota")
            finally:
                os.close(device)
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.ESRCH, errno.EINVAL):
                hint = "use a kernel with ext4 or xfs and their quotas (CONFIG_QFMT_V2, CONFIG_XFS_QUOTA)"
                raise Unavailable("this kernel can't mount a pool with project quotas", hint) from error
            raise
        finally:
            os.close(file)
        os.chmod(self.mount_point, 0o700)

    def _grow(self, size: int) -> None:
        with open(self.file, "r+b") as file:
            kind, before = _kind(file.fileno()), os.fstat(file.fileno()).st_size
            _allocate(file.fileno(), before, size - before)
        number = os.stat(self.mount_point).st_dev
        device_of = os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
        path = f"/dev/{os.path.basename(device_of)}"
        device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            loop.resize(device)
        finally:
            os.close(device)
        _tool(*(("resize2fs", path) if kind == "ext4" else ("xfs_growfs", str(self.mount_point))))


def _allocate(fd: int, start: int, length: int) -> None:
    """Allocate blocks for a part of a file; a hole where the file system can't."""
    os.truncate(fd, start + length)
    with contextlib.suppress(OSError):
        os.posix_fallocate(fd, start, length)
        return
    if os.fstat(fd).st_blocks == 0:
        return
    os.truncate(fd, start)  # the disk is full: nothing stays half made
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _kind(fd: int) -> str:
    """The format of a pool's file, by its magic number. Failed."""
    for kind, (offset, magic) in _MAGIC.items():
        if os.pread(fd, len(magic), offset) == magic:
            return kind
    raise Failed("the pool's file is neither ext4 nor xfs", "restore it, or remove it with all instances")


def _tool(*command: str) -> None:
    """Run a tool of the file system. Unavailable if it is not installed, Failed with its last line."""
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=_TIMEOUT, check=False, stdin=subprocess.DEVNULL, env=_ENVIRONMENT
        )
    except FileNotFoundError:
        package = "xfsprogs" if "xfs" in command[0] else "e2fsprogs"
        raise Unavailable(f"there is no {command[0]} on this host", f"apt-get install {package}") from None
    except subprocess.TimeoutExpired:
        raise Failed(f"{command[0]} takes more than {_TIMEOUT:g} s", "look at the disk") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise Failed(f"{command[0]}: {lines[-1][:200]}", "look at the disk")
