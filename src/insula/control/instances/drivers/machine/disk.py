"""The disk of a machine: a raw sparse file with an ext4, which has what the instance writes.

It is made before the first start, with the size that it keeps. What the guest deletes it gives back (discard).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

from insula.model.errors import Failed

SIZE: Final = 4 << 30
"""Bytes of a disk without a limit of its own; it takes what is written, and a hundredth at first."""
LEAST: Final = 16 << 20
_TIMEOUT = 60
_MKFS = ("/sbin/mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,nodiscard")


def ensure(path: Path, size: int) -> None:
    """Make the disk, complete or not at all, unless it is there. Failed, OSError."""
    if path.exists():
        return
    draft = path.with_name(f"{path.name}.new")
    with draft.open("wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.truncate(size)
    try:
        done = subprocess.run([*_MKFS, draft], capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise Failed("the disk of the machine can't be made in time", "look at the disk below the root") from None
    if done.returncode:
        raise Failed(f"the disk of the machine can't be made: {done.stderr.strip()[-200:]}", "free some space")
    draft.rename(path)
