"""UEFI firmware for guests, found by the descriptors that distributions install beside it (docs/interop/firmware.json
of QEMU). Names of the files themselves differ between distributions.

A descriptor of /etc replaces one of the same name in /usr, and an empty one hides it. The first that fits is taken, in
the order of names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

DIRECTORIES: Final = (Path("/etc/qemu/firmware"), Path("/usr/share/qemu/firmware"))
_NEEDS: Final = {"requires-smm", "enrolled-keys"}
"""Features of firmware that needs a machine of another kind, or starts only what is signed."""
_MACHINES: Final = ("pc-q35-*", "q35")


class UefiFirmware(NamedTuple):
    """The code, and the variables that a machine begins with."""

    code: Path
    variables: Path


def find(directories: Sequence[Path] = DIRECTORIES) -> UefiFirmware | None:
    """Return UEFI firmware for x86-64 whose files are there; None if this host has none."""
    for descriptor in _descriptors(directories):
        found = _read(descriptor)
        if found and found.code.is_file() and found.variables.is_file():
            return found
    return None


def _descriptors(directories: Sequence[Path]) -> Iterator[dict[str, Any]]:
    by_name: dict[str, Path] = {}
    for directory in reversed(directories):
        by_name.update({path.name: path for path in directory.glob("*.json")})
    for _, path in sorted(by_name.items()):
        try:
            found = json.loads(path.read_bytes() or b"null")
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            yield found


def _read(descriptor: Mapping[str, Any]) -> UefiFirmware | None:
    """The files of a descriptor, if it is of firmware that fits."""
    try:
        mapping, targets = descriptor["mapping"], descriptor["targets"]
        fits = any(
            each["architecture"] == "x86_64" and any(name in _MACHINES for name in each["machines"]) for each in targets
        )
        raw = all(mapping[part]["format"] == "raw" for part in ("executable", "nvram-template"))
        files = [Path(mapping[part]["filename"]) for part in ("executable", "nvram-template")]
        flash = mapping["device"] == "flash" and mapping.get("mode", "split") == "split"
        if not (fits and raw and flash) or "uefi" not in descriptor["interface-types"]:
            return None
        return None if _NEEDS & set(descriptor["features"]) else UefiFirmware(*files)
    except (LookupError, TypeError):
        return None
