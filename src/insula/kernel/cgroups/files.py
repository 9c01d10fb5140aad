"""Read and write the files of a control group, whose content the kernel generates and parses."""

from __future__ import annotations

import os


def write(path: str, value: object) -> None:
    """Write a value with one write(2), as the kernel requires. OSError names the value and the file."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, str(value).encode())
    except OSError as error:
        raise OSError(error.errno, f"write {value}: {error.strerror}", path) from None
    finally:
        os.close(fd)


def read(path: str) -> str | None:
    """Return a file's content without the last newline; None if it does not exist or can't be read."""
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


def read_in(directory: int, name: str) -> str:
    """Return the content of the file `name` of the group that `directory` is a descriptor of. OSError."""
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return os.read(fd, 65536).decode()
    finally:
        os.close(fd)


def fields(path: str) -> dict[str, int]:
    """Parse a file of lines "name number" (cgroup-v2.rst, "flat keyed"); empty if there is no such file."""
    try:
        return {name: int(value) for name, value in (line.split() for line in (read(path) or "").splitlines())}
    except ValueError:
        return {}
