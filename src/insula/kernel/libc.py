"""Functions of the C library by ctypes, with errno as OSError.

System calls need a long, a buffer, and errno; all modules that make system calls of their own take them from here.
"""

from __future__ import annotations

import os
from ctypes import CDLL, addressof, c_char, c_int, c_long, create_string_buffer, get_errno, pythonapi, string_at

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from ctypes import Array

    Buffer = Array[c_char]

__all__ = ["Long", "addressof", "at", "buffer", "check", "function", "python", "syscall"]

Long = c_long
"""A C long: what system calls take and answer. A Python integer alone is passed as an int."""

_program = CDLL(None, use_errno=True)


def function(name: str, library: str | None = None, *, long: bool = False) -> Callable[..., int]:
    """A function of the C library, or of `library`, that sets errno and returns an int, or a `long` (or a pointer).

    Arguments: integers (as int), `Long`, bytes (a pointer to them), buffers, None (NULL). OSError without `library`.
    """
    found = (CDLL(library, use_errno=True) if library else _program)[name]
    found.restype = c_long if long else c_int
    return found


syscall = function("syscall", long=True)
"""syscall(2), whose arguments are `Long` where they are integers."""


def python(name: str) -> Callable[[], None]:
    """A function of Python's own C interface that takes and returns nothing; it is called with the lock held."""
    found = pythonapi[name]
    found.restype = None
    return found


def buffer(content: int | bytes) -> Buffer:
    """Memory to be written to, of so many zeros or with a copy of `content`; `.raw` is the content."""
    return create_string_buffer(content) if isinstance(content, int) else create_string_buffer(content, len(content))


def at(address: int, size: int) -> bytes:
    """The content of memory at `address`."""
    return string_at(address, size)


def check(result: int, what: str, on: object = "") -> int:
    """`result`; if it is negative, OSError with errno, the name `what` of the call, and the object it was called on."""
    if result < 0:
        error = get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}", str(on) if on != "" else None)
    return result
