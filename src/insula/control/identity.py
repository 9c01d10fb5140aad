"""The name of this host among all hosts that share a store. `Instance.host` has the name of its host."""

from __future__ import annotations

import platform
import re
from pathlib import Path

from insula.model.errors import Failed

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def host_name(root: Path) -> str:
    """The name in the file ROOT/host. The first start writes the host name of the machine into it. It stays when the
    machine's host name changes, since instances are placed by it. Failed, OSError. Blocks."""
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
