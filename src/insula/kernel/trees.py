"""Remove trees of files that a container or an image has made.

Such a tree may be nested deeper than Python's recursion limit and PATH_MAX, have millions of entries, and names of any
bytes. rm(1) walks by descriptors and keeps a bounded number of them open. It runs as a process of its own, so it
doesn't hold the interpreter's lock. It stays on one file system and follows no link.
"""

from __future__ import annotations

import os
import subprocess
from itertools import islice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_CHUNK = 1 << 16
_FEW, _FLAT = 100, 8  # entries and levels of a small tree


def remove(path: str | os.PathLike[str]) -> None:
    """Remove the file or tree at `path`; no error if there is none. Blocks. OSError with rm's first message."""
    with subprocess.Popen(command(path), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
        assert child.stderr
        said = child.stderr.read(_CHUNK)
        while child.stderr.read(_CHUNK):  # there may be a message for each of a million files
            pass
    check(child.returncode, said)


def remove_small(path: str | os.PathLike[str]) -> bool:
    """Remove the directory at `path` if that takes a handful of system calls: a process takes milliseconds.

    Blocks. False if there is more in it, or something in the way: a part may be gone then, and `remove` does the rest.
    """
    try:
        parent = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        device = os.stat(os.path.basename(path), dir_fd=parent, follow_symlinks=False).st_dev
        return _remove_few(parent, os.path.basename(path), device, _FEW, _FLAT) is not None
    except FileNotFoundError:
        return True
    except OSError:
        return False
    finally:
        os.close(parent)


def _remove_few(parent: int, name: str, device: int, left: int, levels: int) -> int | None:
    """Remove the directory `name` if it has at most `left` entries; returns the rest of `left`, None if it has more.

    OSError.
    """
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        if not levels or os.fstat(fd).st_dev != device:
            return None
        with os.scandir(fd) as entries:
            found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in islice(entries, left + 1)]
        rest: int | None = left - len(found)
        for each, is_directory in found:
            if rest is None or rest < 0:
                return None
            if is_directory:
                rest = _remove_few(fd, each, device, rest, levels - 1)
            else:
                os.unlink(each, dir_fd=fd)
        if rest is not None:
            os.rmdir(name, dir_fd=parent)
        return rest
    finally:
        os.close(fd)


def command(path: str | os.PathLike[str]) -> Sequence[str | os.PathLike[str]]:
    """Return the command line that removes the tree at `path`."""
    return "rm", "-rf", "--one-file-system", "--", path


def check(status: int, said: bytes) -> None:
    """Raise OSError with the first message in `said`, the standard error, if the command's exit `status` isn't 0."""
    if status:
        lines = said.decode(errors="replace").splitlines() or [f"rm ended with status {status}"]
        raise OSError(lines[0].removeprefix("rm: ")[:500])
