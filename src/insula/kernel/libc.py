"""Functions of the C library through ctypes, with errno raised as OSError."""

from __future__ import annotations

import os
from ctypes import CDLL, addressof, c_char, c_int, c_long, get_errno, pythonapi, string_at

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from ctypes import Array

    Buffer = Array[c_char]

__all__ = ["Long", "addressof", "buffer", "check", "function", "python", "read_memory", "syscall"]

Long = c_long
"""A C long, the type of system calls' arguments. ctypes passes a plain Python integer as an int."""

_program = CDLL(None, use_errno=True)
_arrays: dict[int, type[Buffer]] = {}
"""Types of buffers, by their sizes, of which there are few."""


def function(name: str, library: str | None = None, *, long: bool = False) -> Callable[..., int]:
    """Return a function of the C library or of `library` that sets errno; it returns an int, or with `long` a long.

    It takes integers (as int), `Long`, bytes (as a pointer), buffers and None (NULL). OSError if `library` is missing.
    """
    found = (CDLL(library, use_errno=True) if library else _program)[name]
    found.restype = c_long if long else c_int
    return found


syscall = function("syscall", long=True)
"""syscall(2). Integer arguments must be `Long`."""


def python(name: str) -> Callable[[], None]:
    """Return a function of Python's C API that takes and returns nothing; it is called with the GIL held."""
    found = pythonapi[name]
    found.restype = None
    return found


def buffer(content: int | bytes) -> Buffer:
    """Allocate writable memory: a number of zero bytes, or a copy of `content`. `.raw` is its content."""
    size = content if isinstance(content, int) else len(content)
    if size not in _arrays:
        _arrays[size] = c_char * size  # a class, which ctypes would make again and again
    made: Buffer = _arrays[size]()
    if not isinstance(content, int):
        made.raw = content
    return made


def read_memory(address: int, size: int) -> bytes:
    """Return `size` bytes of this process's memory at `address`."""
    return string_at(address, size)


def check(result: int, what: str, on: object = "") -> int:
    """Return `result`; if it is negative raise OSError with errno, the call's name `what` and its object `on`."""
    if result < 0:
        error = get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}", str(on) if on != "" else None)
    return result
