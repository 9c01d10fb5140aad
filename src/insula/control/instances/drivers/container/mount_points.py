"""The lowest layer of every root file system: empty files and directories where each container has a mount.

An image rarely has all of them. overlayfs would make those that are missing in the container's upper directory, which
takes a tenth of a launch, and their removal as long. An image's own files hide those of this layer.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

_DIRECTORIES: Final = ("dev", "etc", "proc", "sys")
_FILES: Final = ("etc/hostname", "etc/hosts", "etc/resolv.conf")


def make(layer: Path) -> None:
    """Make the layer, all of it or nothing, unless it exists. OSError."""
    if layer.is_dir():
        return
    draft = layer.with_name(f"{layer.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    for path in (draft, *(draft / name for name in _DIRECTORIES)):
        path.mkdir()
        path.chmod(0o755)
    for name in _FILES:
        (draft / name).touch()
        (draft / name).chmod(0o644)
    draft.rename(layer)
