"""The name of this host among all that share a store. Instances say by it where they are placed."""

from __future__ import annotations

import platform
import re
from pathlib import Path

from insula.model.errors import Failed

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def host_name(root: Path) -> str:
    """The name in ROOT/host. It is chosen once, after the host's own name at the first start, and stays when that
    changes: else nobody would look after the instances of this host. Failed, OSError. Blocks."""
    file = root / "host"
    try:
        name = file.read_text(errors="replace").strip()
    except FileNotFoundError:
        name = re.sub(r"[^a-z0-9-]", "-", platform.node().partition(".")[0].lower())[:63].strip("-") or "host"
        draft = root / "host.new"
        draft.write_text(f"{name}\n")
        draft.rename(file)
    if not _LABEL.fullmatch(name):
        raise Failed(f"{file} has no valid host name", "write the host name of the instances into it, on one line")
    return name
