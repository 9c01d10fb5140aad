"""Functions of the C library, called through `_ctypes`, the part of ctypes that is written in C.

The package `ctypes` around it makes types for all of C, and takes 1.5 ms to be imported, which is a good part of what a
launch takes. System calls need a long, a buffer, and errno. In all modules that a launch loads they come from here.
"""

from __future__ import annotations

import os
from _ctypes import (
    FUNCFLAG_CDECL,
    FUNCFLAG_PYTHONAPI,
    FUNCFLAG_USE_ERRNO,
    CFuncPtr,
    _SimpleCData,
    addressof,
    dlopen,
    dlsym,
    get_errno,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from ctypes import Array
    from ctypes import c_char as _Char

    Buffer = Array[_Char]
else:

    class _Char(_SimpleCData):
        _type_ = "c"


__all__ = ["Long", "addressof", "at", "buffer", "check", "function", "python", "syscall"]


class Long(_SimpleCData):  # type: ignore[type-arg]
    """A C long: what system calls take and answer. A Python integer alone is passed as an int."""

    _type_ = "l"


class _Int(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "i"


class _ReturningInt(CFuncPtr):
    _flags_ = FUNCFLAG_CDECL | FUNCFLAG_USE_ERRNO
    _restype_ = _Int


class _ReturningLong(CFuncPtr):
    _flags_ = FUNCFLAG_CDECL | FUNCFLAG_USE_ERRNO
    _restype_ = Long


class _Python(CFuncPtr):
    """Called with the interpreter's lock held."""

    _flags_ = FUNCFLAG_CDECL | FUNCFLAG_PYTHONAPI
    _restype_ = None


_program = dlopen(None, 0)  # type: ignore[arg-type]


def function(name: str, library: str | None = None, *, long: bool = False) -> Callable[..., int]:
    """A function of the C library, or of `library`, that sets errno and returns an int, or a `long` (or a pointer).

    Arguments: integers (as int), `Long`, bytes (a pointer to them), buffers, None (NULL). OSError without `library`.
    """
    address = dlsym(dlopen(library, 0) if library else _program, name)
    return _ReturningLong(address) if long else _ReturningInt(address)


syscall = function("syscall", long=True)
"""syscall(2), whose arguments are `Long` where they are integers."""


def python(name: str) -> Callable[[], None]:
    """A function of Python's own C interface that takes and returns nothing."""
    return _Python(dlsym(_program, name))


def buffer(content: int | bytes) -> Buffer:
    """Memory to be written to, of so many zeros or with a copy of `content`; `.raw` is what is in it."""
    if isinstance(content, int):
        return (_Char * content)()
    made: Buffer = (_Char * len(content))()
    made.raw = content
    return made


def at(address: int, size: int) -> bytes:
    """What is in memory at `address`."""
    content: bytes = (_Char * size).from_address(address).raw
    return content


def check(result: int, what: str, on: object = "") -> int:
    """`result`; if it is negative, OSError with errno, the name of what was called, and on what."""
    if result < 0:
        error = get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}", str(on) if on != "" else None)
    return result
