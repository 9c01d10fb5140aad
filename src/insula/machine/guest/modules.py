"""Kernel modules of a guest, in the order in which they can be loaded.

Drivers that a kernel does not have built in are ELF files, loaded with finit_module(2). A module names those that it
needs in its section `.modinfo`, as ``depends=virtio,virtio_ring``. modprobe(8) reads an index of that, made by
depmod(8); here the modules themselves are read, so that neither program is needed.
"""

from __future__ import annotations

import lzma
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")


class Modules:
    """The modules of one kernel. `directory` is its /lib/modules/RELEASE."""

    def __init__(self, directory: Path) -> None:
        self._paths = dict(_find(directory))
        self._built_in = set(_built_in(directory))

    def in_order(self, names: Iterable[str]) -> list[tuple[str, bytes]]:
        """Names and contents of the modules that `names` need, dependencies first. Those that are built in are left
        out. LookupError if the kernel does not have one."""
        found: dict[str, bytes] = {}
        for name in names:
            self._add(_plain(name), found)
        return list(found.items())

    def _add(self, name: str, found: dict[str, bytes]) -> None:
        if name in found or name in self._built_in:
            return
        path = self._paths.get(name)
        if path is None:
            raise LookupError(f"the guest's kernel has no module {name}")
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        for other in dependencies(data):
            self._add(other, found)
        found[name] = data


def dependencies(module: bytes) -> list[str]:
    """The names in `depends=` of a module. ValueError if it is no 64-bit ELF file."""
    for entry in section(module, ".modinfo").split(b"\0"):
        if entry.startswith(b"depends="):
            return [_plain(name) for name in entry.removeprefix(b"depends=").decode().split(",") if name]
    return []


def section(elf: bytes, name: str) -> bytes:
    """The contents of a section of a little-endian 64-bit ELF file (elf(5)); empty if it has none of that name."""
    if len(elf) < _HEADER.size or elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError("it is no 64-bit ELF file")
    header = _HEADER.unpack_from(elf)
    table, size, count, names_at = header[6], header[11], header[12], header[13]
    sections = [_SECTION.unpack_from(elf, table + number * size) for number in range(count)]
    names = sections[names_at][4]
    for entry in sections:
        begin = names + entry[0]
        if elf[begin : begin + len(name) + 1] == name.encode() + b"\0":
            return elf[entry[4] : entry[4] + entry[5]]
    return b""


def _find(directory: Path) -> Iterator[tuple[str, Path]]:
    for parent, _, files in os.walk(directory / "kernel"):
        for file in files:
            if file.endswith((".ko", ".ko.xz")):
                yield _plain(file.partition(".ko")[0]), Path(parent, file)


def _built_in(directory: Path) -> Iterator[str]:
    for line in (directory / "modules.builtin").read_text().splitlines():
        yield _plain(line.rpartition("/")[2].removesuffix(".ko"))


def _plain(name: str) -> str:
    """The name of a module as the kernel has it: files may have '-' where it has '_'."""
    return name.replace("-", "_")
