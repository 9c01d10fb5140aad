"""Remove trees of files that strangers made.

Such a tree may be nested deeper than Python recurses and than a path is long, have millions of entries, and names of
any bytes. rm(1) goes down by descriptors and keeps a bounded number of them; it is a process of its own, so that it
holds up nobody here. It stays on one file system and follows no link.
"""

from __future__ import annotations

import os
import subprocess

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_CHUNK = 1 << 16


def remove(path: str | os.PathLike[str]) -> None:
    """Remove the file or tree at `path`; nothing happens if there is none. OSError says what is left, and why.

    Blocks for as long as it takes.
    """
    with subprocess.Popen(command(path), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
        assert child.stderr
        said = child.stderr.read(_CHUNK)
        while child.stderr.read(_CHUNK):  # there may be a complaint for each of a million files
            pass
    check(child.returncode, said)


def command(path: str | os.PathLike[str]) -> Sequence[str | os.PathLike[str]]:
    """What to execute to remove the tree at `path`."""
    return "rm", "-rf", "--one-file-system", "--", path


def check(status: int, said: bytes) -> None:
    """OSError with its first complaint if that command, which ended with `status`, failed."""
    if status:
        lines = said.decode(errors="replace").splitlines() or [f"rm ended with status {status}"]
        raise OSError(lines[0].removeprefix("rm: ")[:500])
