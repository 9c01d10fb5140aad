"""Files that execve(2) refuses, and the expected error message of each."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple


class Refused(NamedTuple):
    content: bytes | None
    status: int
    reason: str


def elf(machine: int, interpreter: bytes = b"") -> bytes:
    """A 64-bit program without code, for a machine of elf.h (62 is x86_64)."""
    ident = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0x400000, 64, 0, 0, 64, 56, bool(interpreter), 0, 0, 0)
    if not interpreter:
        return ident + header
    name = interpreter + b"\0"
    program = struct.pack("<IIQQQQQQ", 3, 4, 120, 0, 0, len(name), len(name), 1)
    return ident + header + program + name


OURS = {"x86_64": 62, "aarch64": 183, "riscv64": 243}[os.uname().machine]
FOREIGN = 22  # s390x, which none of these runs
MISSING = "No such file or directory: its interpreter '/no/where' is missing"
FORMAT = "Exec format error: it is"

REFUSED = {
    "empty": Refused(b"", 126, f"{FORMAT} empty"),
    "script": Refused(b"echo hi\n", 126, f"{FORMAT} neither an ELF program nor a script that begins with #!"),
    "foreign": Refused(elf(FOREIGN), 126, f"{FORMAT} a program for s390x, and this is {os.uname().machine}"),
    "damaged": Refused(b"\x7fELF is not enough for one", 126, "Exec format error: it is a"),
    "no-shell": Refused(b"#!/no/where -x\n", 127, MISSING),
    "no-loader": Refused(elf(OURS, b"/no/where"), 127, MISSING),
    "nested": Refused(b"#! /bin/no-loader\n", 127, MISSING),
    "not-a-shell": Refused(b"#!/bin/data\n", 126, "Permission denied: its interpreter '/bin/data' may not be executed"),
    "foreign-shell": Refused(
        b"#!/bin/foreign\n", 126, "Exec format error: its interpreter '/bin/foreign' is a program for s390x"
    ),
    "data": Refused(b"#!/bin/sh\n", 126, "Permission denied"),
    "loop": Refused(None, 126, "Too many levels of symbolic links"),
    "dangling": Refused(None, 127, "No such file or directory"),
}


def put(directory: Path) -> None:
    """Make all of them in `directory`, which is /bin of a container."""
    for name, entry in REFUSED.items():
        if entry.content is not None:
            (directory / name).write_bytes(entry.content)
            (directory / name).chmod(0o644 if name == "data" else 0o755)
    (directory / "loop").symlink_to("loop")
    (directory / "dangling").symlink_to("nowhere")
