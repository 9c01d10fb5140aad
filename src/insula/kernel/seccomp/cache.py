"""A cache of compiled seccomp filters in a directory, by profile.

Compiling a profile takes 3 to 8 milliseconds, and importing the compiler as long again; a launch by `insula-oci` takes
about forty. Engines give every container the same profile, so its filter is compiled once and written to a file that is
named by a hash of everything it depends on: the profile, the machine, the compiler's version and libseccomp's file.

A file there decides what a container may do, so a file that a user other than root and the reader could have written is
ignored. Files are written atomically, so several processes may use the cache at once.
"""

from __future__ import annotations

import marshal
import os
import struct
import sys

from insula.kernel import libc
from insula.kernel.seccomp.load import flags_of
from insula.model.cpython import blake2b

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

VERSION = 2
"""The compiler's version, increased whenever the same profile compiles to another filter."""

_DECIDES = ("defaultAction", "defaultErrnoRet", "architectures", "syscalls")


def compiled_file(profile: Mapping[str, Any], directory: str | os.PathLike[str]) -> tuple[str, int]:
    """Return the file of a profile's filter in `directory`, compiled if it is missing, and the flags to load it with.

    `profile` is linux.seccomp of the OCI runtime-spec. Raises `Invalid` and `Unavailable` as `compiler.compile`; a
    cached profile is not checked again.
    """
    path = _path(profile, directory)
    if not os.path.exists(path):
        _make(profile, path)
    return path, flags_of(profile)


def program(profile: Mapping[str, Any], directory: str | os.PathLike[str]) -> tuple[bytes, int]:
    """Return a profile's filter and the flags to load it with, for `seccomp_load.load`; see `compiled_file`."""
    path = _path(profile, directory)
    return _read(path) or _make(profile, path), flags_of(profile)


def _path(profile: Mapping[str, Any], directory: str | os.PathLike[str]) -> str:
    decides = [profile.get(field) for field in _DECIDES]
    try:
        # version 2 of marshal has all types of JSON, and no references between equal objects, which would vary
        identity = marshal.dumps([VERSION, _libseccomp(), os.uname().machine, decides], 2)
    except ValueError:  # nested too deep, or with types that JSON lacks: not cached, and the compiler reports the error
        identity = os.urandom(16)
    return f"{os.fspath(directory)}/{blake2b(identity, digest_size=16).hexdigest()}.bpf"


def _read(path: str) -> bytes:
    """Read the whole file; empty if it is missing or another user could have written it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        status = os.fstat(fd)
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
            return b""
        return os.read(fd, status.st_size)
    finally:
        os.close(fd)


def _make(profile: Mapping[str, Any], path: str) -> bytes:
    from insula.kernel.seccomp import compiler

    compiled = compiler.compile(profile)
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    temporary = f"{path}.{os.getpid()}.{os.urandom(4).hex()}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, compiled)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise
    return compiled


def _libseccomp() -> tuple[int, ...]:
    """Identify the version of libseccomp, whose tables the compiler uses; empty without it."""
    multiarch = getattr(sys.implementation, "_multiarch", "")
    try:  # to load it takes ten times as long as to look at it where Debian has it
        found = os.stat(f"/usr/lib/{multiarch}/libseccomp.so.2")
        return found.st_ino, found.st_size, found.st_mtime_ns
    except OSError:
        pass
    try:
        version = libc.function("seccomp_version", "libseccomp.so.2", long=True)
    except OSError:
        return ()
    return struct.unpack("3I", libc.read_memory(version(), 12))
