"""eBPF programs attached to functions of the kernel, and the maps that they share: bpf(2), BPF_PROG_TYPE_TRACING.

A program runs before a function (FENTRY), after it (FEXIT), or before it with the option to replace its result (MODIFY,
for the security_… functions): a result other than 0 is returned instead of calling the function. Its input is the
function's arguments, 64 bits each. It stays attached while its link is open or *pinned*: named in a file system of type
"bpf".
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from insula.kernel.ebpf.assembler import Assembler
from insula.kernel.ebpf.load import bpf

FENTRY, FEXIT, MODIFY = 24, 25, 26
"""enum bpf_attach_type."""
HASH, ARRAY = 1, 2
"""enum bpf_map_type."""
NO_PREALLOC = 1

_TRACING = 26
_MAP_CREATE, _MAP_LOOKUP, _PROG_LOAD, _OBJ_PIN, _OBJ_GET, _RAW_TRACEPOINT_OPEN = 0, 1, 5, 6, 7, 17
_LICENSE = b"GPL"  # of such a program alone; the kernel lets no other change what a function answers


def create_map(kind: int, key: int, value: int, entries: int, name: str, flags: int = 0) -> int:
    """Create a map with keys and values of these sizes in bytes; returns its descriptor."""
    attr = struct.pack("=7I16s", kind, key, value, entries, flags, 0, 0, name.encode()[:15])
    return bpf(_MAP_CREATE, attr, "BPF_MAP_CREATE")


def lookup(map_: int, key: bytes, size: int) -> bytes | None:
    """Return the value of a key, `size` bytes; None if the map lacks the key."""
    k, value = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(size)
    attr = struct.pack("=IIQQQ", map_, 0, ctypes.addressof(k), ctypes.addressof(value), 0)
    try:
        bpf(_MAP_LOOKUP, attr, "BPF_MAP_LOOKUP_ELEM")
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return None
    return value.raw


def check_allowed() -> None:
    """Check that this process may load tracing programs. OSError."""
    code = Assembler()
    code.move(0, 0)
    code.exit()
    try:
        os.close(_load(code.assemble(), FENTRY, 0, "insula_probe"))
    except OSError as error:
        if error.errno == errno.EPERM:
            raise


def attach(program: bytes, when: int, function: int, name: str) -> int:
    """Attach a program to the function with that number in the kernel's BTF; returns the link's descriptor."""
    fd = _load(program, when, function, name)
    try:
        return bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QI", 0, fd), "BPF_RAW_TRACEPOINT_OPEN")
    finally:
        os.close(fd)


def _load(program: bytes, when: int, function: int, name: str) -> int:
    code, license_ = ctypes.create_string_buffer(program, len(program)), ctypes.create_string_buffer(_LICENSE)
    log = ctypes.create_string_buffer(1 << 16)

    def attr(level: int) -> bytes:
        head = struct.pack("=IIQQ", _TRACING, len(program) // 8, ctypes.addressof(code), ctypes.addressof(license_))
        told = struct.pack("=IIQ", level, len(log) if level else 0, ctypes.addressof(log) if level else 0)
        flags = struct.pack("=II16sII", 0, 0, name.encode()[:15], 0, when)
        return (head + told + flags).ljust(108, b"\0") + struct.pack("=I", function)

    try:
        return bpf(_PROG_LOAD, attr(0), "BPF_PROG_LOAD")
    except OSError:
        try:
            return bpf(_PROG_LOAD, attr(1), "BPF_PROG_LOAD")
        except OSError as again:
            lines = log.value.decode(errors="replace").strip().splitlines()
            raise OSError(again.errno, f"{again.strerror}: {' / '.join(lines[-3:])}") from None


def pin(fd: int, path: str) -> None:
    """Pin a map or a link at a path, so that it stays when the descriptor is closed."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    bpf(_OBJ_PIN, struct.pack("=QI", ctypes.addressof(name), fd), "BPF_OBJ_PIN")


def pinned(path: str) -> int:
    """Open the pinned object at a path. FileNotFoundError."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    return bpf(_OBJ_GET, struct.pack("=Q", ctypes.addressof(name)), "BPF_OBJ_GET")
