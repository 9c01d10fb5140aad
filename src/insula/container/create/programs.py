"""Explain why execve(2) refuses a file that exists: what it is, and whether its interpreter exists.

The kernel answers with an errno alone, and with ENOENT also when a script's or an ELF program's interpreter is what is
missing (execve(2), elf(5)). The file is read inside the container, with the rights of the program's user. Nothing is
imported here, because the caller can import no more.
"""

from __future__ import annotations

import errno
import os

_HEAD = 4096  # bytes
_SHEBANG_LINE = 256  # bytes; the kernel reads no more (BINPRM_BUF_SIZE)
_NESTED = 5  # interpreters of interpreters that the kernel follows
_PT_INTERP = 3
_MACHINES = {  # elf.h
    3: "32-bit x86",
    8: "MIPS",
    20: "32-bit PowerPC",
    21: "PowerPC",
    22: "s390x",
    40: "32-bit ARM",
    62: "x86_64",
    183: "aarch64",
    243: "RISC-V",
    258: "LoongArch",
}
_RUNS = {"x86_64": {3, 62}, "i686": {3}, "aarch64": {40, 183}, "riscv64": {243}}
"""The machines of ELF programs that a kernel of each architecture may run."""


def explained(path: str, error: OSError) -> OSError:
    """`error` of execve(2) on `path`, with the cause that the file shows."""
    why = os.strerror(error.errno or 0)
    if error.errno == errno.ETXTBSY:
        detail = "it is open for writing"
    elif error.errno == errno.EACCES and os.path.isdir(path):
        detail = "it is a directory"
    elif error.errno in (errno.ENOENT, errno.ENOEXEC, errno.EACCES):
        detail = _detail(path, error.errno)
    else:
        detail = "" if error.strerror == why else error.strerror or ""
    return OSError(error.errno, f"{why}: {detail}" if detail else why, path)


def _detail(path: str, number: int) -> str:
    about = "it is"
    for _ in range(_NESTED):
        head = _read(path, 0, _HEAD)
        if head is None:
            return ""
        if head.startswith(b"\x7fELF") and len(head) >= 20:
            if number == errno.ENOEXEC:
                return _foreign(head, about)
            interpreter = _elf_interpreter(path, head)
        elif head.startswith(b"#!"):
            words = head[2:_SHEBANG_LINE].split(b"\n")[0].split(maxsplit=1)
            interpreter = os.fsdecode(words[0]) if words else ""
        else:
            if number != errno.ENOEXEC:
                return ""
            return f"{about} {'neither an ELF program nor a script that begins with #!' if head else 'empty'}"
        if not interpreter:
            return ""
        if not os.path.exists(interpreter):
            return f"its interpreter {_quoted(interpreter)} is missing"
        if not os.access(interpreter, os.X_OK):
            return f"its interpreter {_quoted(interpreter)} may not be executed"
        path, about = interpreter, f"its interpreter {_quoted(interpreter)} is"
    return ""


def _foreign(head: bytes, about: str) -> str:
    order = "big" if head[5] == 2 else "little"
    machine = int.from_bytes(head[18:20], order)  # type: ignore[arg-type]
    ours = os.uname().machine
    if order == "little" and machine in _RUNS.get(ours, {machine}):
        return f"{about} a damaged ELF program"
    return f"{about} a program for {_MACHINES.get(machine, f'machine {machine} of elf.h')}, and this is {ours}"


def _elf_interpreter(path: str, head: bytes) -> str:
    """PT_INTERP of an ELF program of this machine, from its program headers; "" if it has none."""
    wide = head[4] == 2  # ELFCLASS64
    offset_at, sizes_at, size = (32, 54, 8) if wide else (28, 42, 4)
    offset = int.from_bytes(head[offset_at : offset_at + size], "little")
    entry, count = (int.from_bytes(head[at : at + 2], "little") for at in (sizes_at, sizes_at + 2))
    if not (0 < entry <= 256 and count <= 256 and offset < 1 << 40):
        return ""
    table = _read(path, offset, entry * count) or b""
    for at in range(0, len(table) - entry + 1, entry):
        header = table[at : at + entry]
        if int.from_bytes(header[:4], "little") == _PT_INTERP:
            place, length = (8, 32) if wide else (4, 16)
            name_at, name_size = (int.from_bytes(header[i : i + size], "little") for i in (place, length))
            name = _read(path, name_at, name_size) if name_size <= _HEAD and name_at < 1 << 40 else None
            return os.fsdecode((name or b"").rstrip(b"\0"))
    return ""


def _quoted(name: str) -> str:
    text = ascii(name)
    return text if len(text) <= 200 else f"{text[:190]}...'"


def _read(path: str, offset: int, length: int) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            return os.pread(fd, length, offset)
        finally:
            os.close(fd)
    except OSError:
        return None
