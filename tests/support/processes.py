"""Finds processes of this machine by their command line."""

from __future__ import annotations

from pathlib import Path


def find(words: str) -> list[int]:
    """The processes whose command line begins with `words`."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if line.startswith(words):
            found.append(int(path.name))
    return found
