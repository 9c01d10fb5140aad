"""A group's files: short texts that the kernel makes up when they are read, and takes whole when they are written."""

from __future__ import annotations

import os


def write(path: str, value: object) -> None:
    """One write(2): the kernel takes a value whole. OSError names the value and the file."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, str(value).encode())
    except OSError as error:
        raise OSError(error.errno, f"write {value}: {error.strerror}", path) from None
    finally:
        os.close(fd)


def read(path: str) -> str | None:
    """A file's content without the last newline; None if there is no such file, or it can't be read now."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        content = b""
        while chunk := os.read(fd, 65536):
            content += chunk
        return content.decode(errors="replace").rstrip("\n")
    except OSError:
        return None
    finally:
        os.close(fd)


def fields(path: str) -> dict[str, int]:
    """A file of lines "name number" (cgroup-v2.rst, "flat keyed"); empty if there is none."""
    try:
        return {name: int(value) for name, value in (line.split() for line in (read(path) or "").splitlines())}
    except ValueError:
        return {}
