"""Locks of disks: a file that a machine has is given to no other one (flock(2)).

The lock is of the open file description that QEMU is given. So it lasts exactly as long as QEMU, or the shim before it,
has a descriptor of it, whatever becomes of insulad, and the kernel takes it back. QEMU's own locks are off
(`locking=off`): they are of ranges of bytes, and prevent nobody from giving it the file twice.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from insula.control.instances.drivers.in_use import FileInUse
from insula.control.instances.drivers.machine.stored import DISK
from insula.kernel.cgroups.hierarchy import of_process
from insula.kernel.rollback import Rollback
from insula.model.errors import Conflict

log = logging.getLogger("insula.control")
_PATIENCE: Final = 3.0
"""Seconds that a lock may outlast the one who had it: the kernel closes the files of a process that was killed when it
has taken back its memory, and a process that is just being forked has copies of all descriptors."""
_PAUSE: Final = 0.05
_ID: Final = re.compile("[0-9a-f]{32}")


def open_locked(path: Path, instance_id: str, name: str) -> int:
    """A descriptor of a disk, locked, for the machine of an instance. `FileInUse` if another instance has it, else
    Conflict, which names the one who has it. OSError. Blocks."""
    with Rollback() as undo:
        fd = undo.hold(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        end = time.monotonic() + _PATIENCE
        while not _lock(fd):
            if time.monotonic() > end:
                what = "the disk" if path.name == DISK else f"the file {path.name}"
                raise _in_use(f"{what} of {name}", os.fstat(fd), instance_id)
            time.sleep(_PAUSE)
        undo.keep()
        return fd


def is_same(fd: int, path: Path) -> bool:
    """Whether a descriptor is of the file that is at a path now. OSError."""
    return os.path.samestat(os.fstat(fd), path.stat())


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _in_use(file: str, of: os.stat_result, instance_id: str) -> Conflict:
    """Who has a file locked, and what to do."""
    pid = next(_holders(of), None)
    if pid is None:
        return Conflict(f"{file} is in use by another process", "look for it with lslocks(8), and end it")
    process = f"process {pid} ({_command(pid)})"
    owner = os.path.basename(of_process(pid) or "")
    if owner == instance_id:
        what = f"{file} is in use by {process}, which an earlier start of it has left"
        return Conflict(what, "end that process, and start it again")
    if _ID.fullmatch(owner):
        log.warning("instance %s: %s is in use by instance %s, %s", instance_id, file, owner, process)
        return FileInUse(file, owner)
    return Conflict(f"{file} is in use by {process}", "end that process before: two would damage the disk")


def _holders(of: os.stat_result) -> Iterator[int]:
    """The processes that have a descriptor by which a file is locked."""
    for pid in (name for name in os.listdir("/proc") if name.isdecimal()):
        with suppress(OSError):  # it has ended
            if any(_locks(pid, fd, of) for fd in os.listdir(f"/proc/{pid}/fdinfo")):
                yield int(pid)


def _locks(pid: str, fd: str, of: os.stat_result) -> bool:
    """Whether a file is locked by a descriptor of a process (`lock:` in proc_pid_fdinfo(5))."""
    inode = f":{of.st_ino} "
    try:
        said = Path("/proc", pid, "fdinfo", fd).read_text().splitlines()
        found = any(line.startswith("lock:") and " FLOCK " in line and inode in line for line in said)
        return found and os.path.samestat(os.stat(f"/proc/{pid}/fd/{fd}"), of)
    except OSError:  # it was closed
        return False


def _command(pid: int) -> str:
    """The name of a process's command, which it may have chosen itself."""
    try:
        said = Path(f"/proc/{pid}/comm").read_bytes()
    except OSError:
        return "ended"
    return "".join(each for each in said.decode(errors="replace").rstrip("\n") if each.isprintable())
