"""The build of this code, by which a daemon sees whether the monitor and the zygote run the same code."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

_PACKAGES = ("container", "kernel", "model", "tree")


@functools.cache
def build() -> str:
    """A digest of the source files that the monitor and the zygote run."""
    top = Path(__file__).parents[2]
    digest = hashlib.sha256()
    files = [top / "log.py", *(file for name in _PACKAGES for file in (top / name).rglob("*.py"))]
    for file in sorted(files):
        digest.update(f"{file.relative_to(top)}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]
