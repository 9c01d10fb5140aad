"""Remove trees of files that a container or an image has made.

Such a tree may be nested deeper than Python's recursion limit and PATH_MAX, have millions of entries, and names of any
bytes. rm(1) walks by descriptors and keeps a bounded number of them open. It runs as a process of its own, so it
doesn't hold the interpreter's lock. It stays on one file system and follows no link.
"""

from __future__ import annotations

import os
import subprocess

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_CHUNK = 1 << 16


def remove(path: str | os.PathLike[str]) -> None:
    """Remove the file or tree at `path`; no error if there is none. Blocks. OSError with rm's first message."""
    with subprocess.Popen(command(path), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
        assert child.stderr
        said = child.stderr.read(_CHUNK)
        while child.stderr.read(_CHUNK):  # there may be a message for each of a million files
            pass
    check(child.returncode, said)


def command(path: str | os.PathLike[str]) -> Sequence[str | os.PathLike[str]]:
    """Return the command line that removes the tree at `path`."""
    return "rm", "-rf", "--one-file-system", "--", path


def check(status: int, said: bytes) -> None:
    """Raise OSError with the first message in `said`, the standard error, if the command's exit `status` isn't 0."""
    if status:
        lines = said.decode(errors="replace").splitlines() or [f"rm ended with status {status}"]
        raise OSError(lines[0].removeprefix("rm: ")[:500])
